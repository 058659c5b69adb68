"""Readers of the layouts that people's data come in; every one becomes `Rows`."""

from bridges.data.formats.rows import Rows

__all__ = ["Rows"]
