"""torch.export and AOTInductor: in the same process, and in one that has no dynaconv."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv import functional
from dynaconv.registry import family
from dynaconv.testing import close
from dynaconv.testing.families import example, randomized
from dynaconv.testing.features import cases, check_feature
from dynaconv.testing.features.export import exported, others
from dynaconv.testing.primitives import samples
from tests.features.cases import over_families

# Runs every graph in a folder on the inputs beside it, without dynaconv.
ELSEWHERE = """
import pathlib, sys
sys.modules["dynaconv"] = None
import torch
torch.set_num_threads(1)
run = {".pt2": lambda file: torch.export.load(file).module(),
       ".package": lambda file: torch._inductor.aoti_load_package(str(file))}
for file in pathlib.Path(sys.argv[1]).iterdir():
    if file.suffix in run:
        graph = run[file.suffix](file)
        inputs = torch.load(file.with_suffix(".in"))
        torch.save([graph(*given) for given in inputs], file.with_suffix(".out"))
"""


@over_families("export", ranks=(1, 2))
def test_exports(cls, arguments):
    check_feature("export", cls, arguments)


@pytest.mark.slow
@over_families("export", ranks=(3,))
def test_exports_in_3d(cls, arguments):
    check_feature("export", cls, arguments)


@pytest.mark.slow
@over_families("export", samples=None)
def test_exports_with_any_option(cls, arguments):
    check_feature("export", cls, arguments)


def run_elsewhere(folder):
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def compare_elsewhere(folder, models):
    """Exports each (model, example, inputs) and holds what another process gives against it."""
    for name, (model, x, inputs) in models.items():
        torch.export.save(exported(model, x), folder / f"{name}.pt2")
        torch.save([(given,) for given in inputs], folder / f"{name}.in")
    run_elsewhere(folder)
    for name, (model, _, inputs) in models.items():
        for given, actual in zip(inputs, torch.load(folder / f"{name}.out"), strict=True):
            with torch.no_grad():
                close(actual, model(given), f"{name} in another process", 1e-5)


def in_float32(cls, arguments):
    layer = randomized(cls, arguments).float()
    inputs = [x.float() for x in others(cls, arguments)]
    return layer, example(cls, arguments).float(), inputs


def test_in_another_process(tmp_path):
    kinds = ("odconv", "involution", "deform_v2", "condconv", "fdconv", "learned_stride")
    classes = [family(kind).classes[2] for kind in kinds]
    compare_elsewhere(tmp_path, {c.__name__: in_float32(c, c.samples(2)[0]) for c in classes})


@pytest.mark.slow
def test_all_in_another_process(tmp_path):
    found = [(c, a) for c, a in cases() if "export" not in c.limits(a)]
    compare_elsewhere(tmp_path, {c.__name__: in_float32(c, a) for c, a in found})


class Masked(nn.Module):
    """A layer, and the mean of its real positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input, padding_mask):
        output, kept = self.layer(input, padding_mask), self.layer.output_mask(padding_mask)
        return dynaconv.masking.masked_mean(output.masked_fill(~kept.unsqueeze(1), 0), kept)


@pytest.mark.parametrize("name", ["odconv", "condconv", "involution", "deform_v2", "lightconv"])
def test_exports_with_a_padding_mask(name):
    cls = family(name).classes[1]
    model = Masked(randomized(cls, cls.samples(1)[0]))
    mask = dynaconv.mask_from_sizes([9, 11, 4], (11,))
    x = example(cls, cls.samples(1)[0])
    graph = exported(model, x, mask).module()
    other = torch.cat([x, x], 2)[:2], dynaconv.mask_from_sizes([22, 13], (22,))
    close(graph(*other), model(*other), f"{name} with a padding mask")


# Primitives --------------------------------------------------------------------------------


class Call(nn.Module):
    """A primitive of tensors that are given by name."""

    def __init__(self, primitive, settings):
        super().__init__()
        self.primitive, self.settings = primitive, settings

    def forward(self, tensors):
        return getattr(functional, self.primitive)(**tensors, **self.settings)


PRIMITIVES = ("conv", "conv_per_sample", "conv_mixture", "conv_per_position", "deform_conv")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_primitives_export_with_a_free_batch(primitive, rank):
    tensors, settings = list(samples(primitive, rank))[2]
    alone = {"weight", "bias"} if primitive in ("conv", "deform_conv") else set()
    alone |= {"weight", "bias"} if primitive == "conv_mixture" else set()
    free = {name: {} if name in alone else {0: torch.export.Dim.DYNAMIC} for name in tensors}
    model = Call(primitive, settings)
    graph = torch.export.export(model, (tensors,), dynamic_shapes=(free,)).module()
    more = {n: t if n in alone else torch.cat([t, 2 * t])[:5] for n, t in tensors.items()}
    close(graph(more), model(more), f"{primitive} exported, {rank}-D")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_primitives_export_with_free_sizes(rank):
    kernel, size = (3, 2, 2)[:rank], (5, 6, 4)[:rank]
    weight = torch.randn(3, 4, 2, *kernel, dtype=torch.float64)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    call = lambda x: functional.conv_transpose_per_sample(
        x, weight[:1].repeat(x.shape[0], *[1] * (rank + 2)), stride=2, groups=2
    )
    model = Function(call)
    graph = exported(model, x).module()
    other = torch.randn(2, 4, *[n + 3 for n in size], dtype=torch.float64)
    close(graph(other), model(other), "conv_transpose_per_sample exported")


class Function(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def test_resizing_primitives_export_with_a_free_batch():
    call = lambda x: functional.spectral_resize(functional.resample_kernel(x, 5), (3, 4))
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    free = ({0: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(Function(call), (x,), dynamic_shapes=free).module()
    close(graph(x[:2]), call(x[:2]), "resample_kernel and spectral_resize exported")


# AOTInductor -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # of torch, met in unpickling
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.parametrize("name", ["odconv", "involution"])
def test_aot_inductor_package_runs_elsewhere(name, tmp_path):
    model = dynaconv.convert(Net(), name, exact=False, where="second").model.eval()
    program = exported(model, torch.randn(2, 3, 16, 18))
    file = tmp_path / "net.package.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    file.rename(tmp_path / "net.package")
    inputs = [torch.randn(batch, 3, 18, 14) for batch in (1, 5)]
    torch.save([(x,) for x in inputs], tmp_path / "net.in")
    run_elsewhere(tmp_path)
    for x, actual in zip(inputs, torch.load(tmp_path / "net.out"), strict=True):
        with torch.no_grad():
            close(actual, model(x), f"{name}, an AOTInductor package", 1e-5)
