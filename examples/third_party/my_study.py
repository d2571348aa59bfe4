"""``descentlab run my_study:STUDY``: does the batch size matter after the same number of updates?"""

from descentlab.config.tree import StudyDef, StudySpec
from descentlab.core.stage import Stage
from descentlab.report import Column, Report, TableBlock, Verdict


class BatchSpec(StudySpec):
    study: str = "batch"
    steps: int = 60


def plan(cells):  # three runs of each cell
    return [(cell, replicate, "plain", {}) for cell in range(len(cells)) for replicate in range(3)]


def stages(cell):  # the key of stored work comes from it
    return [Stage("training", "train", cell.identity())]


def report(results):
    groups = results.frame.filter(step=results.spec["steps"] - 1).group_by("batch_size", maintain_order=True)
    lines = [Verdict(f"batch size {b[0]}: {rows['test_loss'].mean():.4f} nats") for b, rows in groups]
    return Report("Batch size", STUDY.question, lines, [], {}, TableBlock([Column("run")], []), {}, "")


engine, horizon = (lambda cell: "lockstep"), (lambda cell, planned: (cell.steps, 0))  # steps, first evaluation
GRID, HERE = {"default": {"grid": {"batch_size": [16, 64]}}}, {"module": "my_study", "report": "my_study:report"}
STUDY = StudyDef("batch", "Does the batch size matter?", BatchSpec, GRID, {"default": {}}, plan, **HERE)
