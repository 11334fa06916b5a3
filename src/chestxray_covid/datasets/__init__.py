"""The public sources as samples with provenance; public names are in :mod:`chestxray_covid`."""
