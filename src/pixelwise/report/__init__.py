"""One self-contained HTML page for a run: scores, pictures, curves, data and settings."""

from pixelwise.report.page import write_report

__all__ = ["write_report"]
