"""The one place of the version number."""

__version__ = "0.1.0"

#: What every output for people says.
NOT_A_DEVICE = "For research only. This is not a medical device and makes no diagnosis."
