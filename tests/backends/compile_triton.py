"""Compiles the Triton kernels for a GPU that need not be there, and says what became of them.

    python -m tests.backends.compile_triton bf16 90 [--all | --lay]

One line a kernel and configuration: its name, matrix products, asynchronous copies. The first
configuration only, or all. With --lay the dimension of a tile of `lay`, positions and rows, along
which threads side by side read, without and with padding.
"""

import re
import sys
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from dynaconv.backends.triton import (
    conv_mixture,
    conv_per_position,
    conv_per_sample,
    deform_conv,
)
from dynaconv.backends.triton.launch import lay

GEOMETRY = {f"{letter}{d}": 1 for letter in "KSD" for d in range(3)}
GEOMETRY |= {"P0": 0, "P1": 1, "P2": 1, "K1": 3, "K2": 3}
PLAIN = {"DOUBLE": False, "FAR": False, **GEOMETRY}
PRODUCT = {"PRECISION": "tf32", "RANK": 2, **PLAIN}
EVEN = {"EVEN_ROWS": 256, "EVEN_INNER": 256, "EVEN_SEGMENT": 256}
LINES = {"C": 16, "SP": 64, "WIDEST": 4, "COUNT": 3, "ALIGNED": True, **PLAIN}
MIXED = {"DOUBLE": False, "FAR": False, "WIDTH": 16, "SIZE": 256}
DEFORMED = {"RANK": 2, "MODULATED": True, **PLAIN}
DATA = {"INPUT": True, "OFFSET": True, "MODULATION": True}
UNTUNED = [triton.Config({"SIZE": 256})]
# Kernel, its constants, and the steps that are 1.
CASES = [
    (conv_per_position.forward, LINES, ("SC", "WP", "OP")),
    (conv_per_position.by_input, LINES, ("SC", "WP", "OP")),
    (conv_per_position.by_weight, LINES, ("SC", "WP", "OC")),
    *(
        (
            conv_per_sample.multiply,
            {"TRANSPOSED": back, "EXPERTS": experts, "BIASED": not back, **PRODUCT, **EVEN},
            ("WI" if back else "WJ", "OP"),
        )
        for back in (False, True)
        for experts in (0, 4)
    ),
    (conv_per_sample.correlate, PRODUCT | EVEN, ()),
    (conv_per_sample.multiply_flat, {"BIASED": False, **PRODUCT}, ("OP", "SP")),
    (conv_per_sample.correlate_flat, PRODUCT, ("SP",)),
    (conv_per_sample.fold, {"RANK": 2, **PLAIN}, ("OP",)),
    (conv_mixture.mix, MIXED, ("CE",)),
    (conv_mixture.unmix, MIXED, ("CE",)),
    (
        deform_conv.forward,
        {"BIASED": True, "PRECISION": "tf32", **DEFORMED, **EVEN},
        ("WC", "OP", "FP", "MP"),
    ),
    (deform_conv.forward_depthwise, {"BIASED": True, **DEFORMED}, ("WC", "OP", "FP", "MP")),
    *(
        (
            deform_conv.backward,
            {"DEPTHWISE": depthwise, "KEEP": not depthwise, **DATA, **DEFORMED},
            ("WC", "OC", "FP", "MP"),
        )
        for depthwise in (False, True)
    ),
    (deform_conv.by_weight_depthwise, DEFORMED, ("OC", "FP", "MP")),
]
POINTERS = (
    "out",
    "source",
    "weight",
    "mixture",
    "bias",
    "grad",
    "offset",
    "modulation",
    "columns",
    "coefficients",
)
SUMS = ("by_input", "by_offsets", "by_modulation", "shares")


def compile_one(kernel, constants, ones, config, dtype, architecture):
    """The compiled kernel for arguments of which all but sizes are multiples of 16."""
    function = kernel.fn if isinstance(kernel, Autotuner) else kernel
    constants = constants | config.kwargs | dict.fromkeys(ones, 1)
    signature, hints = {}, {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        single = name in SUMS or (name == "out" and "XS" in function.arg_names)
        signature[name] = f"*{'fp32' if single else dtype}" if name in POINTERS + SUMS else "i32"
        if name == "steps":
            signature[name] = "*i32"
        if not re.fullmatch("[LOH][012]|batch|groups|parts", name):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function, signature, {n: c for n, c in constants.items() if n in signature}, hints
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def reading_order(padded, dtype, architecture):
    """The dimension of `lay`'s tile that threads side by side read along."""
    constants = {"P0": 0, "P1": 1, "P2": 1, "PADDED": padded, "FAR": False}
    tile = triton.Config({"ROWS": 64, "LENGTH": 64})
    code = compile_one(lay, constants, ("SP",), tile, dtype, architecture).asm["ttgir"]
    name = re.search(r"tt\.load .*, (#\w+)>", code)[1]
    return re.search(rf"^{name} = .*order = \[(\d)", code, re.MULTILINE)[1]


def main(dtype, architecture, *rest):
    warnings.simplefilter("ignore")
    if "--lay" in rest:
        print(*(reading_order(padded, dtype, int(architecture)) for padded in (False, True)))
        return
    for kernel, constants, ones in CASES:
        configs = getattr(kernel, "configs", UNTUNED)
        for config in configs if rest else configs[:1]:
            made = compile_one(kernel, constants, ones, config, dtype, int(architecture))
            code = made.asm["ptx"]
            products = len(re.findall(r"wgmma\.mma_async|mma\.sync", code))
            copies = len(re.findall(r"cp\.async\.c", code))
            module = kernel.fn.__module__.rpartition(".")[2]
            print(f"{module}.{kernel.fn.__name__}", products, copies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
