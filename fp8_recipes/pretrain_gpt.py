"""``torchrun --nproc-per-node N -m fp8_recipes.pretrain_gpt <Megatron's flags> --fp8-recipe moss``. See `fp8_recipes.megatron.pretrain`."""

from __future__ import annotations

from .megatron.pretrain import main

if __name__ == "__main__":
    main()
