"""Stage report: one HTML file of a dataset's rollouts, written by viewer/report_page.py."""

from ...schemas.configs import ReportConfig
from ..viewer import report_page
from .base import SingleStage

STAGE = SingleStage("report", ReportConfig, report_page.run)
