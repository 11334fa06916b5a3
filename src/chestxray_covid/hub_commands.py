"""Subcommands about published models: what is bundled, and publishing a run."""

from __future__ import annotations

from pathlib import Path

import click

from chestxray_covid.command import HomePath, translated


@click.command()
@translated
def models() -> None:
    """List the bundled models: classes, size, licence and headline numbers."""
    from chestxray_covid.checkpoint import WEIGHTS_NAME
    from chestxray_covid.errors import INSTALL_AGAIN
    from chestxray_covid.hub import bundled_models, resolve

    found = bundled_models()
    if not found:
        click.echo(f"This installation has no bundled model. {INSTALL_AGAIN}.")
    for number, (name, config) in enumerate(found.items()):
        size = (resolve(name) / WEIGHTS_NAME).stat().st_size / 1e6
        licence = config.provenance.get("license", "not stated")
        click.echo(f"{name}{' (default)' if number == 0 else ''}")
        click.echo(f"  {', '.join(config.classes)}; {config.preprocess.size_px} px; {size:.1f} MB")
        click.echo(f"  licence: {licence}")
        headline = config.provenance.get("headline", {})
        for what, value in headline.items() if isinstance(headline, dict) else ():
            click.echo(f"  {what}: {value}")


@click.command()
@click.argument("run", type=HomePath(exists=True, file_okay=False, path_type=Path))
@click.argument("repository")
@click.option("--message", default=None, help="Of the commit.")
@click.option(
    "--private", is_flag=True, help="Make a new repository private; a public one is refused."
)
@click.option("--branch", default=None, help="Instead of main.")
@click.option("--create-pr", is_flag=True, help="Propose the commit instead of making it.")
@click.option("--license", "licence", default=None, help="For the card, for example cc-by-4.0.")
@click.option("--allow-unjudged", is_flag=True, help="Even without evaluation and audit.")
@translated
def push(
    run: Path,
    repository: str,
    message: str | None,
    private: bool,
    branch: str | None,
    create_pr: bool,
    licence: str | None,
    allow_unjudged: bool,
) -> None:
    """Publish the checkpoint in RUN on the Hub as REPOSITORY, user/name, with a model card.

    The token is the stored one, or HF_TOKEN. A run without evaluation.json and audit.json is
    refused.
    """
    from chestxray_covid.publish import push as publish

    address = publish(
        run,
        repository,
        commit_message=message,
        private=private or None,
        branch=branch,
        create_pr=create_pr,
        license=licence,
        allow_unjudged=allow_unjudged,
    )
    click.echo(address)
