"""Where downloadable datasets come from, under which licence, and the checksum every file must have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it lies below a data folder, where it is published, and its checksum.

    ``checksum`` is ``algorithm:hexadecimal digits``, as its publisher or a widely used library states it: sha256 where
    such a figure exists, md5 else. Empty where none is published: the file is taken as it comes, and said to be.
    """

    path: str
    url: str
    checksum: str


@dataclass(frozen=True)
class Source:
    """A dataset's origin. ``alternatives`` are other forms of the same data, taken when the user has placed one."""

    name: str
    source: str
    licence: str
    files: tuple[RemoteFile, ...]
    alternatives: tuple[RemoteFile, ...] = ()


IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx(name: str, site: str, checksums: tuple[str, ...]) -> tuple[RemoteFile, ...]:
    pairs = zip(IDX_FILES, checksums, strict=True)
    return tuple(RemoteFile(f"{name}/{file}", f"{site}/{file}", checksum) for file, checksum in pairs)


MNIST = Source(
    "mnist",
    "MNIST (LeCun, Cortes, Burges 1998)",
    "CC BY-SA 3.0",
    _idx(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
)

FASHION_MNIST = Source(
    "fashion_mnist",
    "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017)",
    "MIT",
    _idx(
        "fashion_mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "md5:25c81989df183df01b3e8a0aad5dffbe",
            "md5:bef4ecab320f06d8554ea6380940ec79",
            "md5:bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
)

_KRIZ = "https://www.cs.toronto.edu/~kriz"


def _cifar(name: str, python: str, binary: str) -> Source:
    stem = name.replace("cifar", "cifar-")
    one, other = (
        RemoteFile(f"{stem}-{form}.tar.gz", f"{_KRIZ}/{stem}-{form}.tar.gz", f"sha256:{digits}")
        for form, digits in (("python", python), ("binary", binary))
    )
    return Source(name, f"{stem.upper()} (Krizhevsky 2009)", "none stated by its author", (one,), (other,))


CIFAR10 = _cifar(
    "cifar10",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR100 = _cifar(
    "cifar100",
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)

TINYSHAKESPEARE = Source(
    "tinyshakespeare",
    "40,000 lines of Shakespeare's plays, collected by A. Karpathy for char-rnn (2015)",
    "public domain",
    (
        RemoteFile(
            "tinyshakespeare.txt",
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
    ),
)

_LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary"
A9A = Source(
    "a9a",
    "Adult, 1994 census (Platt's encoding, LIBSVM data collection); no checksum is published: not verified",
    "CC BY 4.0 (UCI Adult)",
    (RemoteFile("libsvm/a9a", f"{_LIBSVM}/a9a", ""), RemoteFile("libsvm/a9a.t", f"{_LIBSVM}/a9a.t", "")),
)
COVTYPE = Source(
    "covtype",
    "Forest cover type, binary (Collobert, Bengio, Bengio 2002; LIBSVM data collection); no checksum is published: "
    "not verified",
    "CC BY 4.0 (UCI Covertype)",
    (RemoteFile("libsvm/covtype.libsvm.binary.bz2", f"{_LIBSVM}/covtype.libsvm.binary.bz2", ""),),
)
