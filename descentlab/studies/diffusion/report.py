"""placeholder"""
from __future__ import annotations
from ...report import Report
from .spec import STUDY
def build(results):
    return Report("Diffusion", STUDY.question, [])
