"""Has inductor write its program for the Triton operators, and compiles what kernels are in it, for
a GPU that need not be there.

    python -m tests.backends.inductor_triton "conv_per_sample of large kernels" [--dynamic]

One line for each kernel that is ours: its name, how many configurations are left to try, and the
arguments that a trial's traces are undone in. With --dynamic batch and positions are symbols.
"""

import importlib.util
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.compiler import ASTSource

from tests.backends import trace_triton
from tests.backends.trace_triton import CALLS, TARGET, both

# What inductor asks of a GPU: an H200's.
PROPERTIES = SimpleNamespace(
    name="none", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
    max_threads_per_block=1024, shared_memory_per_block=49152, gcnArchName="",
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, is_integrated=0,
)  # fmt: skip


def pretend():
    """Answers where torch and Triton ask for a GPU."""
    trace_triton.pretend()
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "_get_device_properties": PROPERTIES, "_lazy_init": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    fake_tensor.init_gpu_context = lambda device: None
    # Written in C++, they ask the driver; these do the same and don't.
    item = torch.Tensor.__getitem__
    torch.Tensor.contiguous = lambda t, memory_format=torch.contiguous_format: t.clone(
        memory_format=memory_format
    )
    torch.Tensor.__getitem__ = lambda t, i: (
        t.narrow(0, i.start, i.stop - i.start) if isinstance(i, slice) and i.stop else item(t, i)
    )


def symbols(shapes, environment):
    """The shapes, the input's first, with a symbol for each size of batch and positions."""
    made = {}
    batch, _, *size = shapes[0]

    def symbol(size):
        if size not in made:
            source = torch._dynamo.source.ConstantSource(f"size{size}")
            kind = environment.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
            made[size] = environment.create_symintnode(kind, hint=size, source=source)
        return made[size]

    return [[symbol(n) if n in (batch, *size) else n for n in shape] for shape in shapes]


def program(name, dynamic):
    """Inductor's, for forward and backward."""
    shapes, settings = CALLS[name]
    operator = import_module(f"dynaconv.backends.triton.{name.split()[0]}").operator
    environment = ShapeEnv()
    mode = fake_tensor.FakeTensorMode(shape_env=environment)
    with mode, V.set_fake_mode(mode):
        shapes = symbols(shapes, environment) if dynamic else shapes
        tensors = [torch.empty(shape, device="cuda") for shape in shapes]
        tensors = [torch.empty(operator.shape(*tensors, *settings), device="cuda"), *tensors]
        call = dispatch_functionalize(both(operator, settings))
        graph = make_fx(call, decomposition_table=select_decomp_table())(*tensors)
        post_grad_passes(graph, False)
        lowering = GraphLowering(graph, example_inputs=tensors, shape_env=environment)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*tensors)
            return lowering.codegen()[0].value


def kernels(code, folder):
    """The kernels of a program, each as inductor's launcher of it."""
    parts = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    for index, (name, source) in enumerate(parts):
        path = Path(folder) / f"kernel{index}.py"
        path.write_text(source.replace("\\'", "'"), encoding="utf-8")
        if "user_autotune" in source:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield getattr(module, name)


def compile_first(kernel):
    """In the first of its configurations."""
    config, meta = kernel.configs[0], kernel.triton_meta
    constants = meta["constants"] | config.kwargs
    signature = {
        name: "constexpr" if name in constants else meta["signature"][name]
        for name in kernel.fn.arg_names
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    triton.compile(ASTSource(kernel.fn, signature, constants), target=TARGET, options=options)


def main(name, *rest):
    pretend()
    code = program(name, "--dynamic" in rest)
    with tempfile.TemporaryDirectory() as folder:
        for kernel in kernels(code, folder):
            compile_first(kernel)
            undone = [*kernel.reset_to_zero_arg_names, *kernel.mutated_arg_names]
            print(kernel.fn.__name__, len(kernel.configs), *sorted(undone), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
