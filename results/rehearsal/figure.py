"""Draws the figure beside it: python results/rehearsal/figure.py DIR_RESNET DIR_NANOGPT, two run directories."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

import descentlab as dl


def main(*directories: str) -> None:
    """Loss above, test accuracy below, a column for each run; also the rows with test values as CSV."""
    figure, axes = plt.subplots(2, 2, figsize=(7, 4.6), sharex="col", layout="constrained")
    titles = ("ResNet-18 with BatchNorm, MNIST-5k", "nanoGPT, 10.8 million weights, Shakespeare")
    for (loss, accuracy), name, directory, title in zip(
        axes.T, ("resnet18", "nanogpt"), directories, titles, strict=True
    ):
        frame = dl.load(directory).frame.sort("step")
        tested = frame.drop_nulls("test_loss")
        loss.plot(
            frame["step"] + 1, frame["train_loss"], color="#0072B2", linewidth=1, label="batch, before the update"
        )
        loss.plot(tested["step"] + 1, tested["test_loss"], "o-", color="#D55E00", markersize=4, label="test set")
        accuracy.plot(tested["step"] + 1, tested["test_accuracy"], "o-", color="#D55E00", markersize=4)
        loss.set(title=title, ylabel="loss (nats)", yscale="log" if name == "resnet18" else "linear")
        accuracy.set(xlabel="updates", ylabel="test accuracy", ylim=(0, None))
        loss.title.set_fontsize(9)
        loss.legend(fontsize=7)
        tested.select("step", "samples", "train_loss", "test_loss", "test_accuracy", "wall_s").write_csv(
            Path(__file__).with_name(f"{name}.csv"), float_precision=4
        )
    for suffix in ("png", "pdf"):
        figure.savefig(
            Path(__file__).with_name(f"rehearsal.{suffix}"),
            dpi=150,
            metadata={"CreationDate": None} if suffix == "pdf" else None,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
