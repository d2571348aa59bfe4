"""``descentlab run my_study:STUDY``: does the batch size matter after the same number of updates?"""

from descentlab.config.tree import StudyDef, StudySpec
from descentlab.core.stage import Stage
from descentlab.report import Report, Verdict


class BatchSpec(StudySpec):
    study: str = "batch"
    steps: int = 60


def plan(cells):  # three runs of each cell; the label becomes the column "batch" of the table
    return [(i, r, "plain", {"batch": cell.batch_size}) for i, cell in enumerate(cells) for r in range(3)]


def stages(cell):  # the key of stored work comes from it
    return [Stage("training", "train", cell.identity())]


def report(results):
    ends = results.frame.drop_nulls("test_loss").group_by("run", maintain_order=True).last().group_by("batch")
    lines = [Verdict(f"batch size {key[0]}: {rows['test_loss'].mean():.4f} nats") for key, rows in sorted(ends)]
    return Report("Batch size", STUDY.question, lines)


engine, horizon = (lambda cell: "lockstep"), (lambda cell, planned: (cell.steps, 0))  # updates, first evaluation
GRID, HERE = {"default": {"grid": {"batch_size": [16, 64]}}}, {"module": "my_study", "report": "my_study:report"}
STUDY = StudyDef("batch", "Does the batch size matter?", BatchSpec, GRID, {"default": {}}, plan, **HERE)
