"""Stage report: one HTML file of a dataset's rollouts, written by viewer/report.py."""

from ...schemas.configs import ReportConfig
from ..viewer import report
from .base import SingleStage

STAGE = SingleStage("report", ReportConfig, report.run)
