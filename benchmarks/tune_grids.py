"""The settings that tune.py tries, most important first: what a step of the published recipes runs, then the rest."""

from __future__ import annotations

from bench_tokens import GLOBALS, LOCALS, MODELS
from tune_plan import (
    Constants,
    Entry,
    Plan,
    Setting,
    attention_plan,
    grid,
    loss_plan,
    sum_plan,
    tokens_plan,
    update_plan,
)

from personvit.kernels import adamw, attention, attention_padded, distill, gather, norm, rows, tokens

TILE = "queries num_warps num_stages"
BLOCKS = "queries keys num_warps num_stages"


def resident(direction: str, block: int, split: bool, *values: tuple[int, int, int]) -> Setting:
    """A table entry of kernels that hold a whole sequence of a head on the chip, at head dimension 64."""
    name = f"attention {direction} {block}{'+1' if split else ''}"
    length = {128: 129, 32: 33}[block] if split else 19
    build = f"{name} Dh=64 bf16"
    plans = tuple(attention_plan(direction, model, length, build) for model in MODELS)
    place = Entry(attention, direction.upper(), (block, split, 64))
    return Setting(name, "attention", place, grid(TILE, *values), plans)


def padded(table: str, *values: tuple[int, int, int, int]) -> Setting:
    """A table entry of the kernels in masked blocks, 16-bit, head dimension 64; at 197 tokens."""
    direction = "forward" if table == "FORWARD" else "backward"
    name = f"attention padded {table.lower().replace('_', ' ')}"
    plans = tuple(attention_plan(direction, model, 197, f"{name} Dh=64 bf16") for model in MODELS)
    return Setting(name, "attention", Entry(attention_padded, table, (2, 64)), grid(BLOCKS, *values), plans)


def add_norm(*directions: str) -> tuple[Plan, ...]:
    return tuple(
        tokens_plan(
            "add_layer_norm", direction, model, f"add norm D={width} bf16 branch, fp32 stream {direction}, no gamma"
        )
        for direction in directions
        for model, width in MODELS.items()
    )


def assembly(*directions: str) -> tuple[Plan, ...]:
    return tuple(
        tokens_plan(
            "assemble_tokens",
            direction,
            model,
            f"assemble {GLOBALS[1]}x{width} bf16 patches, masked {direction}",
            f"assemble {LOCALS[1]}x{width} bf16 patches {direction}",
        )
        for direction in directions
        for model, width in MODELS.items()
    )


def gathers() -> tuple[Plan, ...]:
    return tuple(
        tokens_plan("gather_rows", direction, model, f"gather rows D={width} fp32 {direction}")
        for direction in ("forward", "backward")
        for model, width in MODELS.items()
    )


def norm_partials(width: int) -> Plan:
    """Gradients of weight and bias, as a backward of the norm leaves them."""

    def shape(images: int) -> tuple[int, int, int]:
        count = images * sum(crops * (1 + patches) for crops, patches in (GLOBALS, LOCALS))
        return 2, rows.programs_of(count, rows.tile_of(width))[0], width

    return sum_plan(f"weight and bias of a norm, {width} wide", shape, width)


def position_partials(crops: int, patches: int, width: int) -> Plan:
    """Gradients of positions, as the backward of the assembly leaves them."""
    columns = (1 + patches) * width

    def shape(images: int) -> tuple[int, int, int]:
        return 1, -(-images * crops // tokens.CROPS_BACKWARD), columns

    return sum_plan(f"positions of {patches} patches, {width} wide", shape, columns)


SETTINGS = (
    resident(
        "forward", 128, True,
        (128, 4, 1), (128, 16, 1), (64, 4, 1), (64, 8, 1), (64, 4, 2), (64, 8, 2), (64, 16, 2), (32, 4, 1), (32, 8, 1),
        (32, 16, 1), (32, 4, 2), (32, 8, 2), (32, 4, 3), (32, 8, 3), (16, 4, 1), (16, 4, 2), (16, 8, 2),
    ),
    resident(
        "backward", 128, True,  # with 4 warps, more rows, or 32 rows in 16 warps it spills
        (32, 8, 2), (32, 8, 3), (16, 8, 1), (16, 16, 1), (16, 8, 2), (16, 8, 3),
    ),
    resident(
        "forward", 32, True,
        (32, 1, 1), (32, 2, 1), (32, 8, 1), (16, 1, 1), (16, 2, 1), (16, 4, 1), (16, 1, 2), (16, 2, 2), (16, 4, 2),
    ),
    resident(
        "backward", 32, True,  # in one warp it spills
        (32, 2, 1), (32, 8, 1), (16, 2, 1), (16, 4, 1), (16, 8, 1), (16, 2, 2), (16, 4, 2), (16, 8, 2),
    ),
    Setting(
        "add_layer_norm tile", "norm", Constants(rows, ("WARPS", "ELEMENTS")),
        grid(
            "WARPS ELEMENTS",
            (1, 16), (2, 8), (2, 16), (4, 2), (4, 8), (4, 16), (8, 4), (8, 8), (16, 4), (16, 8),
        ),
        add_norm("forward", "backward"), norm,
    ),
    Setting(
        "add_layer_norm programs", "norm", Constants(rows, ("RESIDENT_WARPS",)),
        grid("RESIDENT_WARPS", *((132 * warps,) for warps in (8, 16, 24, 48, 64, 128))),
        add_norm("backward"), norm,
    ),
    Setting(
        "assemble_tokens tile", "tokens", Constants(tokens, ("TILE", "WARPS")),
        grid(
            "TILE WARPS",
            ((4, 128), 4), ((8, 64), 4), ((8, 128), 2), ((8, 128), 4), ((16, 64), 2), ((16, 64), 4), ((16, 128), 4),
            ((32, 32), 4), ((32, 64), 2), ((32, 64), 8), ((32, 128), 4), ((32, 128), 8), ((64, 64), 4), ((64, 64), 8),
            ((128, 64), 8),
        ),
        assembly("forward", "backward"),
    ),
    Setting(
        "assemble_tokens crops forward", "tokens", Constants(tokens, ("CROPS_FORWARD",)),
        grid("CROPS_FORWARD", (1,), (2,), (8,), (16,)), assembly("forward"),
    ),
    Setting(
        "assemble_tokens crops backward", "tokens", Constants(tokens, ("CROPS_BACKWARD",)),
        grid("CROPS_BACKWARD", (2,), (4,), (16,), (32,)), assembly("backward"),
    ),
    *(
        Setting(
            f"distill {entry}", "distill", Entry(distill, "LAUNCHES", entry),
            grid(
                "block warps stages teacher_rows",
                (1024, 4, 3, held), (2048, 4, 2, held), (2048, 4, 3, held), (2048, 4, 4, held), (2048, 8, 3, held),
                (4096, 4, 3, held), (4096, 8, 1, held), (4096, 8, 2, held), (4096, 8, 4, held), (4096, 16, 3, held),
                (8192, 8, 3, held), (8192, 16, 2, held), (8192, 16, 3, held), (4096, 8, 3, 8), (4096, 8, 3, 16),
                (4096, 8, 3, 32), (4096, 8, 3, 64),
            ),
            (loss_plan(name),),
        )
        for entry, name, held in (("wide", "CLS", 16), ("medium", "patch", 32))
    ),
    Setting(
        "adamw_ema", "adamw", Constants(adamw, ("CHUNK", "BLOCK", "NUM_WARPS")),
        grid(
            "CHUNK BLOCK NUM_WARPS",
            (1024, 1024, 4), (2048, 512, 2), (2048, 1024, 4), (2048, 2048, 8), (4096, 512, 2), (4096, 512, 4),
            (4096, 1024, 8), (4096, 2048, 4), (4096, 2048, 8), (8192, 1024, 4), (8192, 2048, 8), (16384, 1024, 4),
            (16384, 2048, 8), (32768, 1024, 4),
        ),
        (update_plan("vit_small_luperson"), update_plan("vit_base_luperson")),
    ),
    Setting(
        "gather_rows", "gather", Constants(gather, ("TILE", "WARPS")),
        grid(
            "TILE WARPS",
            ((2, 128), 1), ((4, 128), 1), ((4, 128), 4), ((4, 256), 4), ((8, 64), 2), ((8, 128), 2), ((8, 128), 4),
            ((8, 256), 4), ((16, 64), 4), ((16, 128), 8), ((32, 32), 4), ((32, 64), 4), ((32, 128), 4), ((32, 128), 8),
        ),
        gathers(),
    ),
    Setting(
        "sum of many partials", "norm", Constants(rows, ("TALL",)),
        grid(
            "TALL",
            *(((height, width),) for height, width in (
                (64, 16), (256, 16), (512, 16), (64, 8), (128, 8), (256, 8), (64, 32), (128, 32), (32, 32),
            )),
        ),
        tuple(norm_partials(width) for width in MODELS.values()), norm,
    ),
    Setting(
        "sum of wide partials", "norm", Constants(rows, ("WIDE",)),
        grid(
            "WIDE",
            *(((height, width),) for height, width in (
                (4, 128), (8, 128), (32, 128), (8, 64), (16, 64), (32, 64), (4, 256), (8, 256), (16, 256), (32, 32),
            )),
        ),
        tuple(position_partials(*crops, width) for crops in (GLOBALS, LOCALS) for width in MODELS.values()), norm,
    ),
    resident(
        "forward", 32, False,
        (32, 1, 1), (32, 2, 1), (32, 8, 1), (16, 1, 1), (16, 2, 1), (16, 4, 1), (16, 2, 2), (16, 4, 2),
    ),
    resident(
        "backward", 32, False,  # 32 rows in 4 warps spill
        (32, 1, 1), (32, 8, 1), (16, 1, 1), (16, 2, 1), (16, 4, 1), (16, 2, 2), (16, 4, 2),
    ),
    padded(
        "FORWARD",
        (64, 64, 4, 1), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 4, 2),
        (64, 128, 8, 1), (128, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 4, 2), (32, 64, 4, 2),
        (32, 64, 4, 3), (32, 128, 4, 2),
    ),
    padded(
        "QUERY_SIDE",
        (64, 64, 4, 1), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 8, 2),
        (128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (32, 32, 4, 2), (32, 128, 4, 2),
    ),
    padded(
        "KEY_SIDE",
        (32, 64, 4, 1), (32, 64, 4, 3), (32, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2),
        (32, 32, 4, 2), (32, 32, 4, 3), (64, 32, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1), (64, 128, 8, 2),
        (16, 64, 4, 2), (16, 64, 4, 3),
    ),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(setting.group for setting in SETTINGS))
