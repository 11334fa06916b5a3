"""``python -m chestxray_covid``, which ``torchrun`` and ``accelerate launch`` run, too."""

from chestxray_covid.cli import main

if __name__ == "__main__":
    main(prog_name="chestxray-covid")
