"""The settings at which each peer is measured: its best known ones, and how it comes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """One peer at one setting.

    Attributes:
        name: for --only and the table.
        words: what is switched on, in words.
        dtype: of the weights that the optimizer updates.
        options: of the peer's script.
        packs: whether a row of a step is max_length tokens of several documents.
    """

    name: str
    words: str
    dtype: str
    options: tuple[str, ...]
    packs: bool = False


GPU = ("--liger", "--attention", "flash_attention_2")
GPU_WORDS = "Liger, FlashAttention-2"
ALL_LINEAR = "all-linear"
ADAPTERS = "adapters beside frozen"  # in place of a dtype: the frozen weights are bfloat16 on a GPU, the adapters float32
LEAN = "collated in two workers, no check for NaN"


def trl(*, on_gpu: bool, fixed_rows: bool, dtypes: list[str]) -> list[Setting]:
    """TRL's SFTTrainer, without activation checkpointing. Its loss never holds all logits (`chunked_nll` is another name for it).

    Left out: packing="wrapped", which lets documents see each other and so is other work, and `use_kernels`, which downloads.

    Args:
        fixed_rows: whether a step has a given number of rows, rather than of tokens.
        dtypes: of the weights; on a CPU only float32 is measured.
    """
    if not on_gpu:
        return [
            Setting("trl", "as it comes: padded", "float32", ()),
            Setting("trl-by-length", "padded, rows of like length together", "float32", ("--group-by-length",)),
            Setting("trl-padding-free", "padding_free", "float32", ("--padding-free",)),
            Setting("trl-packed", "packed", "float32", ("--packing",), packs=True),
        ]
    if fixed_rows:
        shapes = [
            ("trl", f"padded, {GPU_WORDS}", (*GPU, "--lean-host"), False),
            ("trl-padding-free", f"padding_free, {GPU_WORDS}", (*GPU, "--padding-free"), False),
            ("trl-padding-free-lean", f"padding_free, {GPU_WORDS}, {LEAN}", (*GPU, "--padding-free", "--lean-host"), False),
            ("trl-padding-free-compiled", f"padding_free, {GPU_WORDS}, torch_compile", (*GPU, "--padding-free", "--compile"), False),
        ]
    else:
        shapes = [
            ("trl-packed", f"packed, {GPU_WORDS}", (*GPU, "--packing"), True),
            ("trl-packed-lean", f"packed, {GPU_WORDS}, {LEAN}", (*GPU, "--packing", "--lean-host"), True),
            ("trl-packed-compiled", f"packed, {GPU_WORDS}, torch_compile", (*GPU, "--packing", "--compile"), True),
        ]
    return [
        Setting(f"{name}-{dtype}", words, dtype, (*options, "--dtype", dtype), packs)
        for dtype in dtypes
        for name, words, options, packs in shapes
    ]


def with_adapters(setting: Setting, rank: int, targets: str = ALL_LINEAR) -> Setting:
    """The same with LoRA through peft, at all linear layers or at these modules."""
    name = setting.name.removesuffix(f"-{setting.dtype}") + "-lora"
    return replace(setting, name=name, dtype=ADAPTERS, options=(*setting.options, "--lora-rank", str(rank), "--lora-targets", targets))


def trl_grpo(shape: str, *, on_gpu: bool) -> list[str]:
    """The settings of TRL's GRPOTrainer that are tried, in the words of peers/trl_grpo.py; the fastest counts.

    Left out: `use_kernels`, which downloads, and vLLM's sleep, which saves memory and takes time. Importance sampling between the
    log-probabilities of vLLM and of the trainer is off, since verl has no such correction: it would cost TRL one more forward pass.
    """
    if not on_gpu:
        return ["8"]
    return {"7b": ["16", "32:liger"], "1.5b": ["32:liger", "16"]}.get(shape, ["64:liger", "32"])
