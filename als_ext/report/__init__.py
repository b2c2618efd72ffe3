"""The report about a run: one HTML file to look at what was changed, and to decide about it."""

from als_ext.report.page import write_report
from als_ext.report.samples import RunSamples, read_samples, write_samples

__all__ = ["RunSamples", "read_samples", "write_report", "write_samples"]
