"""Every memory-bound kernel compiles for Hopper on a machine without a GPU, loads 16 bytes at a time and keeps fp32 subnormals.

The interpreter runs the kernels' Python, not their compiled code; this covers the inline PTX and the layouts that the interpreter never sees. Triton
decides once per process whether it interprets, so the compilation happens in a subprocess.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from machine_code import has_compiler

POINTERS = {"scale_ptr": "*fp32", "tile_exponent_ptr": "*u8", "payload_ptr": "*u8", "amax_ptr": "*fp32", "partial_ptr": "*u8", "exponent_ptr": "*u8"}
POINTERS |= {"global_ptr": "*fp32", "rstd_ptr": "*fp32", "target_ptr": "*u8", "prob_ptr": "*fp32", "prob_gradient_ptr": "*fp32"}
POINTERS |= {"alpha_ptr": "*fp32", "alpha_gradient_ptr": "*fp32", "h_scale_ptr": "*fp32", "saved_ptr": "*u8", "table_ptr": "*i64"}
SCALARS = {"increment": "fp32", "eps": "fp32"}
LOCAL = {name: {"LOCAL": name, "FOLD": name == "micro"} for name in ("micro", "row", "tile")}
ROWS = [  # granularity, E5M2, columns (4096: one block; 11008: block and tail), PROB: every pair of values of any two of them stands in one of the six
    ("micro", False, 4096, False),
    ("micro", True, 11008, True),
    ("row", False, 11008, True),
    ("row", True, 4096, False),
    ("tile", False, 4096, True),
    ("tile", True, 11008, False),
]
WORDS = {"payload_ptr": "*i32", "out_ptr": "*i32", "source_ptr": "*fp32"}
SIGMOID = "ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32"  # between 0 and 1, plus 1: what is flushed does not count
EXP_MINUS_1 = re.compile(r"(ex2|rcp)\.approx\.ftz\.f32 \S+, t;")  # next to a 1, gelu's tail below 1e-38, logits nothing next to their row
TRANSPOSE = {"PARTS": 128, "COLUMNS_FIRST": True}


def cases() -> list[tuple[str, str, dict, dict, int]]:
    """(module, kernel, constants, types of arguments that differ from the usual, least 16-byte loads)."""
    found: list[tuple[str, str, dict, dict, int]] = []
    for local, e5m2, cols, prob in ROWS:
        row = {"cols_for_plan": cols, "E5M2": e5m2, **LOCAL[local]}
        found.append(("quantize", "_quantize_rows_kernel", {**row, "GLOBAL": False}, {}, 3))
        pieces = import_module("fp8_recipes.kernels.rmsnorm").row_options(cols, local)
        found.append(("rmsnorm", "_rmsnorm_quantize_kernel", {**pieces, "E5M2": e5m2, **LOCAL[local]}, {}, 4 * pieces["PIECES"]))
        row = {**row, "PROB": prob}
        found.append(("swiglu", "_swiglu_quantize_kernel", {**row, "H": "", "SAVE": False}, {}, 6))
        found.append(("swiglu", "_swiglu_backward_quantize_kernel", {**row, "H": ""}, {}, 6))
        for xielu in (False, True):
            found.append(("ungated", "_ungated_quantize_kernel", {**row, "XIELU": xielu, "H": "", "SAVE": False}, {}, 3))
            found.append(("ungated", "_ungated_backward_quantize_kernel", {**row, "XIELU": xielu, "SOURCE": False, "H": ""}, {}, 6))
    for e5m2 in (False, True):
        for group, source in ((0, "*fp32"), (32, "*u8")):
            for tr, warps in ((128, 4), (256, 8)):
                constants = {**TRANSPOSE, "TR": tr, "GROUP": group, "OVERLAP": group == 0, "E5M2": e5m2, "num_warps": warps}
                found.append(("fold_transpose", "_fold_transpose_kernel", constants, {**WORDS, "source_ptr": source}, 8))
        constants = {**TRANSPOSE, "TR": 128, "GROUP": -1, "OVERLAP": False, "E5M2": e5m2}
        found.append(("fold_transpose", "_fold_transpose_kernel", constants, {**WORDS, "source_ptr": "*fp32", "partial_ptr": "*fp32"}, 8))
        found.append(("fold_transpose", "_quantize_given_transposed_kernel", {"TR": 128, "TC": 64, "COLUMNS_FIRST": True, "E5M2": e5m2}, WORDS, 8))
        found.append(("fold_transpose", "_fold_transpose_bytes_kernel", {"PARTS": 128, "GROUP": 32, "E5M2": e5m2}, {"source_ptr": "*u8"}, 0))
        found.append(("quantize", "_quantize_wide_rows_kernel", {"TILES": 32, "GLOBAL": False, "E5M2": e5m2, **LOCAL["micro"]}, {}, 4))
        found.append(("quantize", "_quantize_block_kernel", {"E5M2": e5m2, "num_warps": 8}, {}, 4))
        found.append(("quantize", "_quantize_given_kernel", {"BLOCK": 4096, "E5M2": e5m2}, {}, 4))
        fold = {"ROWS_PER_SCALE": 1, "COLS_PER_SCALE": 32, "ROWS_PER_TARGET": 128, "COLS_PER_TARGET": 128, "BLOCK": 4096, "E5M2": e5m2}
        found.append(("quantize", "_fold_kernel", fold, {"source_ptr": "*u8"}, 2))
    measured = {"cols_for_plan": 4096, "E5M2": False, "LOCAL": "micro", "FOLD": False, "GLOBAL": True}
    found.append(("quantize", "_quantize_rows_kernel", measured, {"scale_ptr": "*u8"}, 3))
    found.append(("quantize", "_partial_amax_kernel", {"BLOCK": 4096}, {"partial_ptr": "*fp32"}, 4))
    found += experts_cases()
    found.append(("tanh", "_tanh_kernel", {"R": 4, "C": 1024}, {"alpha_ptr": "*fp32"}, 4))
    found.append(("tanh", "_tanh_backward_kernel", {"R": 4, "C": 1024}, {"alpha_ptr": "*fp32"}, 8))
    qkv = import_module("fp8_recipes.kernels.qkv")
    angles = dict.fromkeys(("angle_ptr", "alpha_q_ptr", "alpha_k_ptr"), "*fp32")
    for heads, head in ((4, 128), (1, 64), (8, 128), (7, 64), (32, 128)):
        forward, backward = (qkv.options(heads, head, n) for n in (qkv.FORWARD, qkv.BACKWARD))
        found.append(("qkv", "_qkv_kernel", forward, angles, 2 * forward["AT_ONCE"] + 6))  # key, value and twice four angles
        found.append(("qkv", "_qkv_backward_kernel", backward, angles, 4 * backward["AT_ONCE"] + 8))
    norm = import_module("fp8_recipes.kernels.rmsnorm_add")
    for cols in (2048, 4096, 5120, 7168):
        forward = norm.row_options(cols)
        found.append(("rmsnorm_add", "_rmsnorm_add_kernel", forward, {}, 3 * forward["PIECES"]))
        backward = norm.backward_plan(8192, cols)[1]
        found.append(("rmsnorm_add", "_rmsnorm_add_backward_kernel", backward, {"partial_ptr": "*fp32"}, 3 * backward["PIECES"]))
    found.append(("rmsnorm_add", "_add_rows_kernel", norm.ADD, {"partial_ptr": "*fp32"}, 8))
    found.append(("cross_entropy", "_softmax_parts_kernel", {"BLOCK": 4096, "num_warps": 4}, {"labels_ptr": "*i64", "parts_ptr": "*fp32"}, 4))
    vectors = {"labels_ptr": "*i64"} | dict.fromkeys(("lse_ptr", "target_ptr", "dloss_ptr"), "*fp32")
    for local, e5m2 in (("micro", True), ("row", False), ("tile", True)):
        form = {**import_module("fp8_recipes.kernels.cross_entropy").GRADIENT_OPTIONS, "E5M2": e5m2, **LOCAL[local]}
        found.append(("cross_entropy", "_cross_entropy_backward_quantize_kernel", form, vectors, 2 * form["PIECES"]))
    found += permute_cases()
    found += routing_cases()
    found += dispatch_cases()
    found += moments_cases()
    for group, source, e5m2 in ((0, "*fp32", True), (128, "*fp32", False), (32, "*u8", True)):
        forms = WORDS | {"source_ptr": source, "block_expert_ptr": "*i32"}
        found.append(("tile_transpose", "_tile_transpose_kernel", {"GROUP": group, "E5M2": e5m2, "BLOCKS": group > 0}, forms, 8))
    targets = {"needed_ptr": "*i32", "out_ptr": "*i32", "block_expert_ptr": "*i32", "payload_ptr": "*i32"}
    for group, source, e5m2 in ((0, "*fp32", True), (0, "*fp32", False), (32, "*u8", False)):
        alone = {"block_expert_ptr": None} if group else {}
        for name in ("_needed_kernel", "_fold_columns_kernel"):
            found.append(("column_fold", name, {"GROUP": group, "E5M2": e5m2, **alone}, targets | {"source_ptr": source}, 8))
    found.append(("column_fold", "_scale_kernel", {"BLOCKS": 32}, {"needed_ptr": "*u8", "offsets_ptr": "*i32"}, 1))
    found.append(("fold_transpose", "_partial_target_kernel", {"ROWS": 64, "TILES": 32, "OVERLAP": True, "num_warps": 8}, {}, 0))
    return found


def experts_cases() -> list[tuple[str, str, dict, dict, int]]:
    """Weights through the table of addresses; SwiGLU, GeLU and xIELU that save h in FP8, and from the saved h, at the widths of experts."""
    found: list[tuple[str, str, dict, dict, int]] = []
    fp8 = {"h_ptr": "*u8"}
    for e5m2 in (False, True):
        form = {"E5M2": e5m2}
        for aligned in (False, True):
            found.append(("experts", "_quantize_experts_kernel", {"BLOCK": 8192, "ALIGNED": aligned, **form}, {}, 8 * aligned))
            tile = {"TR": 128, "TC": 64, "ALIGNED": aligned, **form}
            found.append(("experts", "_quantize_experts_transposed_kernel", tile, {"out_ptr": "*i32"}, 8 * aligned))
    for e5m2, cols in ((False, 768), (True, 1408), (False, 2048), (True, 7168)):
        row = {"cols_for_plan": cols, "PROB": True, "LOCAL": "row", "FOLD": False, "E5M2": e5m2}
        found.append(("swiglu", "_swiglu_quantize_kernel", {**row, "H": "", "SAVE": True, "per_thread": 24}, {}, 4))
        found.append(("swiglu", "_swiglu_quantize_kernel", {**row, "H": "e5m2" if e5m2 else "e4m3", "SAVE": False}, fp8, 2))
        found.append(("swiglu", "_swiglu_backward_quantize_kernel", {**row, "H": "e4m3"}, fp8, 4))
    for e5m2, cols in ((False, 1152), (True, 2112), (True, 3072)):
        for xielu in (False, True):
            row = {"cols_for_plan": cols, "PROB": True, "LOCAL": "row", "FOLD": False, "E5M2": e5m2, "XIELU": xielu}
            found.append(("ungated", "_ungated_quantize_kernel", {**row, "H": "", "SAVE": True}, {}, 2))
            found.append(("ungated", "_ungated_quantize_kernel", {**row, "H": "e5m2" if e5m2 else "e4m3", "SAVE": False}, fp8, 1))
            found.append(("ungated", "_ungated_backward_quantize_kernel", {**row, "SOURCE": True, "H": "e4m3"}, {**fp8, "source_ptr": "*i32"}, 3))
    found.append(("experts", "_measure_experts_kernel", {"BLOCK": 4096, "ALIGNED": True}, {"partial_ptr": "*fp32"}, 4))
    return found


def moments_cases() -> list[tuple[str, str, dict, dict, int]]:
    """Moments of a bf16 tensor, of one beside its payload, and of a payload alone; the first with fp32 too."""
    found: list[tuple[str, str, dict, dict, int]] = []
    m = import_module("fp8_recipes.kernels.moments")
    types = dict.fromkeys(("row_sum_ptr", "out_ptr"), "*fp64") | dict.fromkeys(("payload_ptr", "target_ptr", "source_ptr"), "*i32")
    usual = {"SOURCE": False, "ROW_SUMS": False, "ROWS": m.ROWS, "num_warps": m.ROWS, "maxnreg": m.REGISTERS}
    for e5m2 in (False, True):
        for x, payload, scale, fold, loads in (
            (True, False, False, False, 5),  # four pieces at a time, and the last ones
            (True, False, True, False, 5),
            (True, True, True, True, 10),
            (False, True, True, True, 5),
        ):
            kind = {"X": x, "PAYLOAD": payload, "SCALE": scale, "FOLD": fold, "E5M2": e5m2, **usual}
            found.append(("moments", "_moments_kernel", kind, types, loads))
    found.append(("moments", "_moments_kernel", {**kind, "X": True, "ROW_SUMS": True}, types, 10))
    found.append(("moments", "_moments_kernel", {**kind, "SOURCE": True}, types, 5))
    found.append(("moments", "_moments_kernel", {**kind, "X": True, "PAYLOAD": False, "FOLD": False}, types | {"x_ptr": "*fp32"}, 10))
    for source in (False, True):
        targets = {"SOURCE": source, "ROWS": m.TARGET_ROWS, "TILES": 32}
        found.append(("moments", "_target_kernel", targets, types, 0))
    return found


def permute_cases() -> list[tuple[str, str, dict, dict, int]]:
    """Routing, gather and combine, at the widths of DeepSeek-V2-Lite and V3."""
    found: list[tuple[str, str, dict, dict, int]] = []
    words = dict.fromkeys(("x_ptr", "out_ptr", "scale_ptr", "scale_out_ptr", "prob_ptr", "prob_out_ptr", "source_ptr", "destination_ptr"), "*i32")
    for k, block, warps in ((1, 512, 2), (6, 512, 2), (8, 2048, 8)):
        gather = {"K": k, "BLOCK": block, "SCALES": 1, "TILES": 64, "PROB": True, "num_warps": warps}
        found.append(("permute", "_gather_rows_kernel", gather, {**words, "tile_ptr": "*u8", "tile_out_ptr": "*u8"}, 1))
        for weight in (False, True):
            combine = {"K": k, "BLOCK": 1024, "WEIGHT": weight, "num_warps": 4}
            found.append(("permute", "_combine_rows_kernel", combine, {"weight_ptr": "*fp32", "destination_ptr": "*i32"}, k))
    integers = ("expert", "begin", "demand", "source", "destination", "offset", "block_expert", "count")
    index = {f"{name}_ptr": "*i32" for name in integers}
    found.append(("permute", "_count_kernel", {"COPIES": 128}, index, 0))
    found.append(("permute", "_scan_kernel", {"BLOCKS": 128, "EXPERTS": 16}, index, 0))
    found.append(("permute", "_place_kernel", {"COPIES": 128, "EXPERTS": 256, "num_warps": 4}, index, 0))
    return found


def routing_cases() -> list[tuple[str, str, dict, dict, int]]:
    """From the router's map to ids and probabilities and back, at the widths of DeepSeek-V2-Lite and V3."""
    found: list[tuple[str, str, dict, dict, int]] = []
    for k, slots, tokens, e, prob in ((6, 8, 32, 64, "*fp32"), (8, 8, 8, 256, "*bf16")):
        types = {"prob_ptr": prob, "map_ptr": "*u8", "index_ptr": "*i32", "grad_ptr": "*fp32"}
        numbers = {"K": k, "TOKENS": tokens, "E": e}
        found.append(("routing", "_chosen_experts_kernel", {**numbers, "SLOTS": slots}, types | {"out_ptr": "*fp32"}, 0))
        found.append(("routing", "_chosen_experts_backward_kernel", numbers, types | {"out_ptr": prob}, 0))
    types = {"value_ptr": "*fp32", "destination_ptr": "*i32", "out_ptr": "*fp32"}
    found.append(("routing", "_copies_of_rows_kernel", {"BLOCK": 1024}, types, 0))
    return found


def dispatch_cases() -> list[tuple[str, str, dict, dict, int]]:
    """Send maps and rows on the wire, at the widths of DeepSeek-V2-Lite and V3, forward (with ids and probabilities) and backward."""
    found: list[tuple[str, str, dict, dict, int]] = []
    names = ("payload", "scale", "prob", "expert", "destination", "row_of_copy", "out", "in", "begin", "demand", "header")
    types = {f"{name}_ptr": "*i32" for name in names} | {"half_ptr": "*i16", "byte_ptr": "*u8", "tile_ptr": "*u8"}
    for k, c, tokens, ranks in ((6, 2, 64, 2), (8, 8, 16, 64)):
        numbers = {"K": k, "TOKENS": tokens, "RANKS": ranks}
        found.append(("dispatch", "_count_tokens_kernel", numbers, types, 0))
        found.append(("dispatch", "_place_tokens_kernel", {**numbers, "C": c}, types, 0))
    for k, c, block, warps in ((6, 2, 512, 2), (8, 8, 2048, 8), (0, 8, 2048, 8)):
        rows = {"K": k, "LANES": 8, "BLOCK": block, "TILES": 64, "num_warps": warps}
        found.append(("dispatch", "_pack_rows_kernel", {**rows, "C": c}, types, 1))
    found.append(("dispatch", "_unpack_routing_kernel", {"K": 6, "BLOCK": 1024}, types | {"word_ptr": "*i32"}, 0))
    found.append(("dispatch", "_copies_of_sent_kernel", {"K": 6, "BLOCK": 1024}, {"value_ptr": "*fp32", "row_of_copy_ptr": "*i32", "out_ptr": "*fp32"}, 0))
    return found


def compile_all() -> list[dict]:
    """Runs in the subprocess: what the compiler made of every case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = import_module("fp8_recipes.kernels.rows")
    results = []
    for module, name, constants, types, loads in cases():
        kernel = getattr(import_module(f"fp8_recipes.kernels.{module}"), name)
        constants = dict(constants)
        options = {"num_warps": constants.pop("num_warps", 4), **({"maxnreg": constants.pop("maxnreg")} if "maxnreg" in constants else {})}
        if "cols_for_plan" in constants:
            plan = rows.plan_row(constants.pop("cols_for_plan"), constants.pop("per_thread", 0))
            constants |= {"BLOCK": plan.block, "TAIL": plan.tail}
            options["num_warps"] = plan.warps
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            usual = POINTERS.get(argument) or ("*bf16" if argument.endswith("_ptr") else SCALARS.get(argument, "i32"))
            signature[argument] = "constexpr" if argument in constants else types.get(argument, usual)
            if argument not in constants and signature[argument] != "fp32":
                attributes[(i,)] = [["tt.divisibility", 16]]
        if "out_ptr" in signature and name in ("_fold_kernel", "_fold_transpose_bytes_kernel"):
            signature["out_ptr"] = "*u8"
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = compiled.asm["ptx"]
        vector_loads = sum("ld.global" in line and (".v4.b32" in line or ".v2.b64" in line) for line in ptx.splitlines())
        ftz = ".ftz." in EXP_MINUS_1.sub("", ptx.replace(SIGMOID, ""))
        results.append({"case": f"{name} {constants}", "loads": vector_loads, "least": loads, "ftz": ftz, "cubin": len(compiled.asm["cubin"])})
    return results


@has_compiler
def test_kernels_compile_for_hopper():
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    # Triton's cache stays as it is: its key is the source, the options and the compiler
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert len(results) == len(cases())
    for r in results:
        assert r["loads"] >= r["least"], f"{r['case']}: {r['loads']} 16-byte loads, expected at least {r['least']}"
        assert not r["ftz"], f"{r['case']} flushes fp32 subnormals, which the reference keeps"
        assert r["cubin"] > 0


if __name__ == "__main__":
    print(json.dumps(compile_all()))
