"""Linear attention over packed documents: delta rules, and the short convolutions before them.

Models of transformers (Qwen3-Next, Qwen3.5, Kimi Linear, OLMo Hybrid, LFM2, …) call both as functions of their module, with
`packed_kwargs(batch)`. `keep_documents_apart` replaces these functions by functions that start each document afresh:

- convolutions: in PyTorch, on every device;
- rules: by the kernels of flash-linear-attention, on CUDA in half precision and after a trial; otherwise by the model's own PyTorch code,
  on documents of similar length at a time.

Dimensions: T tokens of the packed batch; C channels, W width of a convolution; S documents of a group, L tokens of its longest one. A
leading 1 is the batch dimension of transformers.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN

CONVOLUTION = "causal_conv1d_fn"
RULE = re.compile(r"(chunk|recurrent).*(delta|kda)")
PACKAGE, INSTALL = "flash-linear-attention", 'pip install "verl[fla]"'
NOT_INSTALLED = "not installed"
TOLERANCE = 0.05  # relative error of bfloat16 sums; a state that is carried into the next document gives 0.2 and more
HALF = (torch.bfloat16, torch.float16)
LENGTHS = (1, 130, 300)  # tokens of the documents of the trial


@dataclass(frozen=True)
class Rule:
    """A delta rule of a model.

    Attributes:
        module, name: where transformers has its function.
        shapes: shape of query, key, value, decay and beta of one token.
    """

    module: str
    name: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Calls:
    """What a model has called.

    Attributes:
        convolution: whether it has computed a short convolution.
        rule: the delta rule that it has computed; None: none.
    """

    convolution: bool = False
    rule: Rule | None = None

    @property
    def are_recurrent(self) -> bool:
        return self.convolution or self.rule is not None


class CarriedState(Protocol):
    """What a layer carries from token to token during generation. Its functions are given this as `carried`."""

    def convolve(self, function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
        """Compute a convolution; `function` computes it without a state."""

    def compute(self, module: str, name: str, inputs: Sequence[Tensor], **options: Any) -> tuple[Tensor, None]:
        """Compute the rule of this name in a module, of query, key, value, decay and beta."""


@dataclass(frozen=True)
class RuleChoice:
    """How this process computes a delta rule.

    Attributes:
        refused: why flash-linear-attention does not compute it; None if it does.
        has_gpu: whether a GPU could compute it.
    """

    rule: Rule
    refused: str | None = None
    has_gpu: bool = True

    def describe(self) -> str:
        if self.refused is None:
            return f"{PACKAGE} {getattr(sys.modules.get('fla'), '__version__', '')}, without CUDA graphs"
        fix = f"; {INSTALL}" if self.refused == NOT_INSTALLED and self.has_gpu else ""
        return f"PyTorch's operations, documents of similar length at a time: exact, but slower ({PACKAGE}: {self.refused}{fix})"


# Global, because the functions of transformers' modules are. Rules by module and name, and whether the kernels compute them.
_by_kernels: dict[tuple[str, str], bool] = {}
_calls: Calls | None = None


def choose(rule: Rule, refusal: Callable[..., str | None], device_type: str, dtype: torch.dtype) -> RuleChoice:
    """Choose between flash-linear-attention and the model's own code.

    Args:
        refusal: returns why the kernels cannot be used here, see `verl.engine.hardware.Hardware`.
    """
    if device_type != "cuda":
        return RuleChoice(rule, "no GPU", has_gpu=False)
    if dtype not in HALF:
        return RuleChoice(rule, "it needs bfloat16 or float16")
    return RuleChoice(rule, refusal("fla", dtype, rule))


def use_rule(choice: RuleChoice) -> None:
    """Let this process compute a rule as it was chosen."""
    _by_kernels[choice.rule.module, choice.rule.name] = choice.refused is None


@contextmanager
def watched() -> Iterator[Calls]:
    """In this context, note which of these functions models call."""
    global _calls
    before, _calls = _calls, Calls()
    try:
        yield _calls
    finally:
        _calls = before


def keep_documents_apart(model: nn.Module) -> None:
    """Replace the short convolutions and delta rules of a transformers model by functions that start each document afresh.

    They are replaced in the module that defines them, once in a process.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        if name.startswith("transformers.models."):
            _replace(sys.modules[name])


def _replace(module: ModuleType) -> None:
    for name, found in list(vars(module).items()):
        if name == CONVOLUTION or RULE.search(name):
            code = _function(found)
            if isinstance(code, FunctionType) and not hasattr(code, "replaced"):
                function: Any = _convolution(code) if name == CONVOLUTION else _rule(code, module.__name__, name)
                function.replaced = code
                setattr(module, name, function)


def _function(found: Any) -> Any:
    """Return the function itself, which is a layer where the package `kernels` is installed."""
    return inspect.getclosurevars(type(found).forward).nonlocals.get("func") if isinstance(found, nn.Module) else found


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' PyTorch code of a function that calls a package where it is installed."""
    own: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return own


# Convolutions


def _convolution(code: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(code)
    def convolve(*args: Any, cu_seq_lens_q: Tensor | None = None, carried: CarriedState | None = None, **options: Any) -> Tensor:
        if carried is not None:
            return carried.convolve(convolve, *args, **options)
        if _calls is not None:
            _calls.convolution = True
        if cu_seq_lens_q is not None:
            return _convolve_apart(*args, bounds=cu_seq_lens_q, **options)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in (*args, *options.values()))
        return (code if on_gpu else own_code(code))(*args, **options)

    return convolve


def _convolve_apart(
    hidden_1CT: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, bounds: Tensor, **_: Any
) -> Tensor:
    """Compute a causal depthwise convolution with weight_CW and bias_C within each document."""
    token_T = torch.arange(hidden_1CT.shape[2], device=bounds.device, dtype=bounds.dtype)
    position_T = token_T - bounds[torch.searchsorted(bounds, token_T, right=True) - 1]
    output_TC: Tensor = _Convolution.apply(hidden_1CT[0].T, weight, position_T)
    if bias is not None:
        output_TC = output_TC + bias
    if activation is not None:
        output_TC = ACT2FN[activation](output_TC)
    return output_TC.T[None].to(hidden_1CT.dtype)


class _Convolution(torch.autograd.Function):
    """A sum of shifted products. Its own backward pass saves only the input: autograd would save each product."""

    @staticmethod
    def forward(ctx: Any, input_TC: Tensor, weight_CW: Tensor, position_T: Tensor) -> Tensor:
        ctx.save_for_backward(input_TC, weight_CW, position_T)
        precise, width = torch.promote_types(input_TC.dtype, torch.float32), weight_CW.shape[1]
        terms = (_earlier(input_TC, shift, position_T).to(precise) * weight_CW[:, width - 1 - shift] for shift in range(width))
        return sum(terms, start=torch.zeros((), device=input_TC.device)).to(weight_CW.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_TC: Tensor) -> tuple[Tensor, Tensor, None]:
        input_TC, weight_CW, position_T = ctx.saved_tensors
        precise, width = torch.promote_types(input_TC.dtype, torch.float32), weight_CW.shape[1]
        input_gradient_TC, weight_gradients = torch.zeros((), device=input_TC.device), []
        for shift in range(width):
            mine_TC = torch.where((position_T >= shift)[:, None], gradient_TC, 0).to(precise)
            input_gradient_TC = input_gradient_TC + F.pad(mine_TC * weight_CW[:, width - 1 - shift], (0, 0, 0, shift))[shift:]
            weight_gradients.append((mine_TC * _earlier(input_TC, shift, position_T)).sum(0))
        weight_gradient_CW = torch.stack(weight_gradients[::-1], 1)
        return input_gradient_TC.to(input_TC.dtype), weight_gradient_CW.to(weight_CW.dtype), None


def _earlier(input_TC: Tensor, shift: int, position_T: Tensor) -> Tensor:
    """Return the input of the token `shift` tokens earlier in the same document, and 0 where there is none."""
    if shift == 0:
        return input_TC
    return torch.where((position_T >= shift)[:, None], F.pad(input_TC, (0, 0, shift, 0))[: len(input_TC)], 0)


# Rules


def _rule(code: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    own = own_code(code)

    @wraps(code)
    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        carried: CarriedState | None = options.pop("carried", None)
        if carried is not None:
            return carried.compute(module, name, (query, key, value, g, beta), **options)
        inputs, bounds = (query, key, value, g, beta), cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if _calls is not None:
            _calls.rule = Rule(module, name, tuple(tuple(x.shape[2:]) for x in inputs))
        # Where none was chosen, transformers chooses for a document alone.
        by_kernels = _fits_kernels(query) and _by_kernels.get((module, name), bounds is None)
        if by_kernels or bounds is None:
            found: tuple[Tensor, Tensor | None] = _call(code if by_kernels else own, inputs, cu_seqlens=bounds, **options)
            return found
        return _by_length(own, inputs, bounds, **options)

    return torch.compiler.disable(compute)  # type: ignore[no-any-return]


def _fits_kernels(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in HALF


def _call(function: Callable[..., Any], inputs: Sequence[Tensor], **options: Any) -> Any:
    query, key, value, g, beta = inputs
    return function(query, key, value, g=g, beta=beta, **options)


def _by_length(own: Callable[..., Any], inputs: Sequence[Tensor], bounds: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute a rule by PyTorch, for documents whose lengths round up to the same power of two at a time, padded at their ends.

    Padding changes neither what comes before it nor the last state.
    """
    lengths = bounds.diff().tolist()
    groups: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(document)
    documents = [x[0].split(lengths) for x in inputs]
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for group in groups.values():
        padded = [pad_sequence([parts[document] for document in group], batch_first=True) for parts in documents]
        output_SL, state_S = _call(own, padded, **options)
        for number, document in enumerate(group):
            found[document] = output_SL[number, : lengths[document]], None if state_S is None else state_S[number]
    outputs, states = zip(*(found[document] for document in sorted(found)), strict=True)
    return torch.cat(outputs)[None], None if states[0] is None else torch.stack(states)


# The trial of the kernels


def refusal(rule: Rule, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why flash-linear-attention cannot compute a rule here, in one line; None if it can.

    Its output and gradients of three packed documents must match those of the model's own code.
    """
    try:
        importlib.import_module("fla.ops")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        return NOT_INSTALLED if missing.split(".")[0] == "fla" else f"its dependency {missing} is not installed"
    except Exception as error:  # a package for another PyTorch or Triton may raise anything
        return f"cannot be imported: {_first_line(error)}"
    code = getattr(sys.modules[rule.module], rule.name).replaced
    own = own_code(code)
    try:
        found = _results(lambda inputs, bounds, options: _call(code, inputs, cu_seqlens=bounds, **options)[0], rule, device, dtype)
    except Exception as error:  # whatever the package raises, the run continues without it and reports why
        return f"fails on this machine: {_first_line(error)}"
    expected = _results(lambda inputs, bounds, options: _by_length(own, inputs, bounds, **options)[0], rule, device, dtype)
    difference = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    return None if difference < TOLERANCE else f"differs from the model's own code by {difference:.2g}"


def _results(compute: Callable[..., Tensor], rule: Rule, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients, for states that last for many tokens."""
    generator, tokens = torch.Generator(device).manual_seed(0), sum(LENGTHS)  # does not advance the run's random state
    query, key, value, decay, beta = (torch.randn(1, tokens, *shape, device=device, generator=generator) for shape in rule.shapes)
    inputs = [x.to(dtype) for x in (query, key, value)] + [-0.01 * decay.abs(), beta.sigmoid().to(dtype)]
    bounds = F.pad(torch.tensor(LENGTHS, device=device).cumsum(0), (1, 0)).int()
    options = {"use_qk_l2norm_in_kernel": True, "initial_state": None, "output_final_state": False}
    with torch.enable_grad():
        output = compute([x.requires_grad_() for x in inputs], bounds, options)
        weights = torch.randn(output.shape, device=device, generator=generator).to(output.dtype)
        gradients = torch.autograd.grad(output, inputs, weights)
    return [x.detach().float() for x in (output, *gradients)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
