"""Work-arounds for Megatron-Core, all of them, in one place. Each says what it replaces, why, for which versions, and when it can go. (Functions of Megatron
that a feature wraps are wrapped in its own module: weight_scaling_hook, calibration, delayed_state, metrics, report.)

`install()` is idempotent. It refuses versions that were never tried, before anything is touched. The same changes as diffs: patches/README.md.

Not needed here, though other custom recipes need them: SafeUnpickler's allow-list (our recipe is stateless in checkpoints, see te/shims.py) and
get_fp8_align_size (Megatron's 16 is
what our products want).
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..te.shims import replace
from . import arguments, attention_arguments, fog_arguments, metrics

SUPPORTED = ((0, 19), (0, 20))
"""Megatron-Core versions [from, to) that the shims were tried with (0.19.2)."""
_STAND_IN = "fused_weight_gradient_mlp_cuda"


def require_megatron() -> None:
    """ImportError if Megatron-Core is missing or lacks megatron.training, RuntimeError if its version is outside the tested range."""
    version = _megatron_version()
    if version is None:
        raise ImportError("fp8_recipes.megatron needs Megatron-Core: pip install 'megatron-core>=0.19,<0.20' psutil (Python 3.12 or newer)")
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= found < SUPPORTED[1]:
        raise RuntimeError(
            f"Megatron-Core {version} is untested with fp8_recipes (tested: 0.19.x); install 'megatron-core>=0.19,<0.20', "
            "or run this version without fp8_recipes (--fp8-recipe custom --fp8-quantizer-factory needs none of these shims)"
        )
    if importlib.util.find_spec("megatron.training") is None:
        raise ImportError("this Megatron-Core has no megatron.training (only wheels from 0.17 and checkouts do): pip install 'megatron-core>=0.19,<0.20'")


def _megatron_version() -> str | None:
    """Version of the Megatron that ``import megatron.core`` would load, None if there is none. Imports nothing of it.

    A checkout on the path shadows an installed wheel, so the package's own constants are read before the wheel's metadata.
    """
    spec = importlib.util.find_spec("megatron")
    for location in (spec.submodule_search_locations or []) if spec else []:
        info = Path(location) / "core" / "package_info.py"
        if info.is_file():
            parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", info.read_text(), flags=re.MULTILINE))
            return ".".join(parts[key] for key in ("MAJOR", "MINOR", "PATCH"))
    try:
        return metadata.version("megatron-core") if spec else None
    except metadata.PackageNotFoundError:
        return None


def install() -> None:
    """Apply every shim once. Call it before Megatron parses its arguments."""
    require_megatron()
    from ..te.shims import delayed_maxima, require_import

    require_import()
    fused_weight_gradient()  # before megatron.core is imported: it looks for the module at import
    refuse_patched_megatron()
    recipe_flag()
    printable_help()
    early_validation()
    recipe_of_config()
    recipe_of_module()
    fused_mlp()
    flow_moe()
    fp8_head()
    embedding_multiplier()
    one_region_around_the_layers()
    dataset_helpers()
    delayed_maxima()
    from .calibration import install as install_calibration
    from .delayed_state import install as install_delayed_state
    from .weight_scaling_hook import install as install_weight_scaling

    install_delayed_state()
    install_calibration()
    install_weight_scaling()


def refuse_patched_megatron() -> None:
    """RuntimeError where diffs of patches/ were applied that must not act twice: FOG's width and embedding would be multiplied twice."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training.arguments import validate_args

    if any("fp8_recipes" in inspect.getsource(inspect.unwrap(f)) for f in (validate_args, LanguageModelEmbedding.forward, GPTModel.__init__)):
        raise RuntimeError(
            "this Megatron has the patches of fp8_recipes applied, and its shims would do the same once more: start Megatron's own pretrain_gpt.py "
            "without 'import fp8_recipes.megatron_adaptor', or take the patches out (patch -R)"
        )


# --- flags ------------------------------------------------------------------------------------------------------------------------------------------------


def recipe_flag() -> None:
    """``megatron.training.arguments.add_megatron_arguments``: --fp8-recipe takes our recipes.

    The flag's choices are generated from a Literal in TransformerConfig, and a free specification (``moss:interval=200``) is no fixed choice. Wrapping the
    parser's builder
    serves every launcher, ours and people's own. 0.19. Can go when the choices can be extended by plugins.
    """
    from megatron.training import arguments as upstream

    def wrapper(original: Any) -> Any:
        def add_megatron_arguments(parser: Any) -> Any:
            return arguments.extend_parser(original(parser))

        return add_megatron_arguments

    replace(upstream, "add_megatron_arguments", wrapper)


def printable_help() -> None:
    """``megatron.training.arguments.add_megatron_arguments``: --help prints.

    The help of one of 0.19.2's flags holds a percent sign that is not escaped, and argparse, which takes it for a format, ends in a ValueError. Can go when
    upstream escapes it.
    """
    from megatron.training import arguments as upstream

    def wrapper(original: Any) -> Any:
        def add_megatron_arguments(parser: Any) -> Any:
            parser = original(parser)
            for action in parser._actions:
                try:
                    _ = (action.help or "") % {**vars(action), "prog": ""}
                except (ValueError, TypeError, KeyError):
                    action.help = action.help.replace("%", "%%")
            return parser

        return add_megatron_arguments

    replace(upstream, "add_megatron_arguments", wrapper)


def early_validation() -> None:
    """``megatron.training.arguments.validate_args``: fill in what our recipe implies and refuse what it cannot honour, before anything is built.

    Without it the user would meet an assertion deep in a layer. 0.19. Stays: it is a feature, not a work-around.
    """
    from megatron.training import arguments as upstream

    def wrapper(original: Any) -> Any:
        def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
            notes = fog_arguments.prepare(args) + attention_arguments.prepare(args) + arguments.prepare(args)
            arguments.check(args)
            metrics.check(args)
            if getattr(args, "rank", 0) == 0:
                for note in notes:
                    print(f"fp8_recipes: {note}", flush=True)
            return original(args, *rest, **kwargs)

        return validate_args

    replace(upstream, "validate_args", wrapper)


# --- recipe -----------------------------------------------------------------------------------------------------------------------------------------------


def recipe_of_config() -> None:
    """``megatron.core.fp8_utils.get_fp8_recipe``: our specification to our TransformerEngine recipe.

    Upstream's function knows a fixed list and builds a new object at every layer; ours returns one object per recipe, so TransformerEngine keeps its
    quantizers.
    0.16 to 0.19. Can go when recipes can be registered by name.
    """
    from megatron.core import fp8_utils

    def wrapper(original: Any) -> Any:
        def get_fp8_recipe(config: Any) -> Any:
            if not arguments.is_ours(config.fp8_recipe):
                return original(config)
            from .. import te

            return te.recipe(arguments.layers_recipe(str(config.fp8_recipe)))

        return get_fp8_recipe

    replace(fp8_utils, "get_fp8_recipe", wrapper)


def recipe_of_module() -> None:
    """``megatron.core.fp8_utils._get_custom_recipe``: our recipes in ``--te-precision-config-file`` and ``--fp8-quantizer-factory``.

    ``custom_recipe_factory: fp8_recipes.megatron.factories.moss`` names a quantizer factory; upstream wraps it in a bare CustomRecipe, whose object is
    pickled into
    checkpoints and then refused at load. For our factories this returns the same stateless recipe object as the flag. Can go with `recipe_of_config`.
    """
    from megatron.core import fp8_utils

    def wrapper(original: Any) -> Any:
        def _get_custom_recipe(path: str) -> Any:
            from . import factories

            name = factories.recipe_name(path)
            if name is None:
                return original(path)
            from .. import te

            return te.recipe(name)

        return _get_custom_recipe

    replace(fp8_utils, "_get_custom_recipe", wrapper)


def fused_mlp() -> None:
    """``megatron.core.transformer.mlp.MLP.forward``: norm, fc1, SwiGLU and fc2 of the dense MLP as one function where it qualifies (see `mlp`).

    Megatron's MLP calls its activation between two TransformerEngine modules, in bf16 both ways. 0.19. Stays: it is a feature, not a work-around.
    """
    from megatron.core.transformer import mlp as upstream

    def wrapper(original: Any) -> Any:
        from .mlp import forward

        return forward(original)

    replace(upstream.MLP, "forward", wrapper)


def flow_moe() -> None:
    """``megatron.core.transformer.moe.moe_layer.MoELayer.forward``: everything between router and combined output as one function (see `moe`).

    Every dispatcher of Megatron sends bf16 on Hopper, and its experts quantise and dequantise at each step between. 0.19. Stays: it is a feature, not a
    work-around.
    """
    from megatron.core.transformer.moe import moe_layer as upstream

    def wrapper(original: Any) -> Any:
        from .moe import forward

        return forward(original)

    replace(upstream.MoELayer, "forward", wrapper)


def fp8_head() -> None:
    """``GPTModel.__init__``: the output layer in FP8 where our recipe says head=fp8 (see `head`).

    Upstream's output layer is its own module in bf16, or TransformerEngine's under mxfp8. 0.19. Stays: it is a feature, not a work-around.
    """
    from megatron.core.models.gpt import gpt_model as upstream

    def wrapper(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            from .head import install

            install(self)

        return __init__

    replace(upstream.GPTModel, "__init__", wrapper)


def embedding_multiplier() -> None:
    """``LanguageModelEmbedding.forward``: multiplied by ``config.embedding_multiplier``, which `fog.block_spec` sets.

    Upstream has such a factor only as a part of muP, together with everything else of it. 0.19. Can go when the factor has a field of its own.
    """
    from megatron.core.models.common.embeddings import language_model_embedding as upstream

    def wrapper(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            y = original(self, *args, **kwargs)
            multiplier = getattr(self.config, "embedding_multiplier", 1.0)
            return y if multiplier == 1.0 else y * multiplier

        return forward

    replace(upstream.LanguageModelEmbedding, "forward", wrapper)


def one_region_around_the_layers() -> None:
    """``TransformerBlock.forward``: inside one FP8 region where our recipe has FP8 attention, as upstream does for delayed scaling.

    Upstream opens a region per layer for every other recipe, and TransformerEngine moves *all* delayed maxima on whenever an outermost region ends: with L
    layers a history of 1024 steps would hold 1024 / L. 0.19. Can go when the choice depends on the recipe's state and not on its name.
    """
    from megatron.core.transformer import transformer_block as upstream

    def wrapper(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            spec = arguments.in_force(self.config)
            if spec is None or arguments.resolve(spec).attention != "fp8":
                return original(self, *args, **kwargs)
            from megatron.core.fp8_utils import get_fp8_context

            with get_fp8_context(self.config):
                return original(self, *args, **kwargs)

        return forward

    replace(upstream.TransformerBlock, "forward", wrapper)


# --- things that the released wheel lacks -----------------------------------------------------------------------------------------------------------------


def dataset_helpers() -> None:
    """``megatron.core.datasets.utils.compile_helpers``: do not run make where the wheel ships the compiled helpers and no Makefile.

    initialize_megatron calls it unconditionally and exits when make fails, so the released wheel cannot train. 0.17 to 0.19. Can go when compile_helpers
    tries the import first.
    """
    from megatron.core.datasets import utils

    def wrapper(original: Any) -> Any:
        def compile_helpers() -> None:
            no_makefile = not (Path(utils.__file__).parent / "Makefile").is_file()
            if no_makefile and importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
                return
            original()

        return compile_helpers

    replace(utils, "compile_helpers", wrapper)


def fused_weight_gradient() -> None:
    """Module ``fused_weight_gradient_mlp_cuda`` of apex: a stand-in with the two functions that Megatron calls.

    gradient_accumulation_fusion is on by default and the LM head (Megatron's own ColumnParallelLinear) demands apex for it; TransformerEngine's linears do
    not. A real apex is
    left alone. 0.16 to 0.19. Can go when tensor_parallel/layers.py accumulates through TransformerEngine's general_gemm, as it does for FSDP.
    """
    if _STAND_IN in sys.modules or importlib.util.find_spec(_STAND_IN) is not None:
        return
    module = types.ModuleType(_STAND_IN, "Stand-in by fp8_recipes for apex's extension: weight gradient accumulated into main_grad.")
    module.wgrad_gemm_accum_fp32 = accumulate_weight_gradient  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate_weight_gradient  # type: ignore[attr-defined]
    sys.modules[_STAND_IN] = module
    for name in ("megatron.core.tensor_parallel.layers", "megatron.core.utils"):
        imported: Any = sys.modules.get(name)
        if imported is not None:  # it looked for apex when it was imported, and remembers that there was none
            setattr(imported, _STAND_IN, module)
            if hasattr(imported, "_grad_accum_fusion_available"):
                imported._grad_accum_fusion_available = True


def accumulate_weight_gradient(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """``main_grad += grad_output^T @ total_input``, in place; [tokens, in] and [tokens, out] into [out, in].

    On the GPU TransformerEngine's GEMM adds inside the product, in FP32 (any main_grad dtype, no temporary). torch cannot mix dtypes in addmm, so on the CPU
    the product is made in
    main_grad's dtype or FP32, whichever is wider.
    """
    if total_input.shape[0] != grad_output.shape[0] or main_grad.shape != (grad_output.shape[1], total_input.shape[1]):
        raise ValueError(
            f"shapes do not match: weight gradient {tuple(main_grad.shape)}, grad_output {tuple(grad_output.shape)}, input {tuple(total_input.shape)}; "
            "expected [out, in], [tokens, out], [tokens, in]"
        )
    if total_input.is_cuda:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(total_input, grad_output, out_dtype=main_grad.dtype, layout="NT", grad=True, accumulate=True, out=main_grad)
        return
    product = grad_output.float().t() @ total_input.float()
    main_grad.copy_(main_grad.float() + product)


def refuse_wrong_device() -> None:
    """RecipeError unless this process's GPU can run the FP8 kernels."""
    ops.refuse_wrong_device("Use --fp8-recipe bf16, or Megatron's own mxfp8 on Blackwell")
