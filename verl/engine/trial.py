"""The check before training: what a model computes of packed documents is what it computes of each document alone.

`choose_path` tries a tiny twin of the model and chooses how the run computes. The other checks look at the model itself, once it is loaded.

Dimensions: T tokens of the packed batch; L tokens of one document; M trained positions; V vocabulary.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from verl import dist
from verl.data.batch import Batch
from verl.data.groups import collate_groups, grouped, numbers_of
from verl.data.pack import Document, collate
from verl.engine.layers import require_input_gradient
from verl.engine.scorers import Scorer, TokenScorer
from verl.errors import UserError
from verl.models.attention import plain
from verl.models.attention.delta_rule import keep_documents_apart, watched
from verl.models.attention.packed import PACKED, PACKED_PATH, USE_ANOTHER, ForwardPath
from verl.models.damage import check_finite, no_language_model
from verl.models.load import decoder_of, language_class
from verl.models.twin import random_model, twin_configs

TOLERANCE = 1e-3  # of float32 log-probabilities of a real model, and of its hidden states relative to the largest
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}  # of a twin; with float64 weights, some models compute a part in float32
SHORT_LENGTHS = (5, 3)  # tokens; on a real model they take no time
# The second is shorter than the windows of a twin (`verl.models.twin.SHORT`), and the others are longer.
LENGTHS = (41, 6, 23)
RECURRENT = re.compile(r"mamba|mixer|ssm|rwkv|recurrent|delta|lstm|lightning|linearattention|shortconv|kda", re.IGNORECASE)
NO_INTERFACE = "its attention code has no interface for packed texts"
WINDOW = re.compile(r"window|attention_chunk")
OTHER_PARTS = re.compile(r"(model|lm|mlp|norm|layer|embedding|embeddings|sdpaattention|cache)$", re.IGNORECASE)


def probe_documents(vocabulary: int, lengths: Sequence[int] = SHORT_LENGTHS) -> list[Document]:
    """Return documents of different tokens, all trained."""
    return [(np.arange(7 + n, 7 + n + 31 * n, 31, dtype=np.int32) % vocabulary, np.ones(n, dtype=bool)) for n in lengths]


@dataclass(frozen=True)
class Twin:
    """A tiny model of the architecture, and what it computes by its own code of each document alone.

    Attributes:
        make: builds it with another attention implementation and the same weights; None: the one that transformers takes by itself.
        attention: name of that one.
        expected_M: log-probabilities of `documents`.
    """

    make: Callable[[str | None], PreTrainedModel]
    attention: str
    documents: list[Document]
    dtype: torch.dtype
    expected_M: Tensor


_chosen: dict[str, ForwardPath] = {}  # by config: a run asks several times


def choose_path(config: PretrainedConfig, where: str, *, trust_remote_code: bool = False, context_size: int = 1) -> ForwardPath:
    """Choose how to compute batches with this architecture, by a trial on a tiny twin. Every rank chooses the same.

    Args:
        where: name of the model, for messages.
        context_size: number of processes that share each document.
    Raises:
        UserError: it must run one document at a time, which cannot be shared; its logits depend on later tokens; or it cannot be computed
            exactly.
    """
    own_code = getattr(config, "auto_map", None) if trust_remote_code else None
    if own_code and "AutoModelForCausalLM" not in own_code:
        return PACKED_PATH  # a reward model of another kind, which check_hidden looks at
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and language_class(config) is AutoModelForCausalLM:
        raise no_language_model(config.model_type, where)
    key = config.to_json_string(use_diff=False)
    if key not in _chosen:
        with _quiet():
            found = _make_twin(config, where, trust_remote_code=trust_remote_code)
            _chosen[key] = _choose(found, where) if isinstance(found, Twin) else _untried(found)
    path = _chosen[key]
    if not path.packed and context_size > 1:
        what = f"this {config.model_type} model runs one document at a time: {path.why}"
        raise UserError(what, where=f"model.context_parallel_size={context_size}", fix="set it to 1")
    if path.recurrent and context_size > 1:
        what = (
            f"the layers of this {config.model_type} model carry a state from token to token, so a document cannot be split over processes"
        )
        raise UserError(what, where=f"model.context_parallel_size={context_size}", fix="set it to 1")
    return path


def _make_twin(config: PretrainedConfig, where: str, *, trust_remote_code: bool) -> Twin | Exception:
    """Return a twin, or why none could be made."""
    failure: Exception | None = None
    for twin in twin_configs(config):
        documents = probe_documents(twin.get_text_config(decoder=True).vocab_size, LENGTHS)
        for dtype in TOLERANCES:

            def make(attention: str | None, twin: PretrainedConfig = twin, dtype: torch.dtype = dtype) -> PreTrainedModel:
                # Grouped matmuls of experts do not exist in float64.
                options = {"experts_implementation": "eager", "trust_remote_code": trust_remote_code}
                chosen = {} if attention is None else {"attn_implementation": attention}
                model = random_model(lambda config: language_class(config).from_config(config, **options, **chosen), twin, dtype)
                keep_documents_apart(model)
                return model

            try:
                # Some releases of transformers have other attention by default, which leaves out the caps.
                has_caps = getattr(twin.get_text_config(decoder=True), "attn_logit_softcapping", None)
                model = make("eager" if has_caps else None)
                expected_M = _alone(model, documents, where, TOLERANCES[dtype])
                return Twin(make, model.config._attn_implementation, documents, dtype, expected_M)
            except UserError:
                raise
            except Exception as error:  # not every architecture can be that small, or computes in float64
                failure = failure or error
    assert failure is not None
    return failure


def _untried(failure: Exception) -> ForwardPath:
    """Return the path that needs no trial: the logits of the model's own code."""
    return ForwardPath(packed=False, attention="eager", own_logits=True, why=f"no tiny twin of it can be tried ({_first_line(failure)})")


@torch.no_grad()
def _alone(model: PreTrainedModel, documents: Sequence[Document], where: str, tolerance: float) -> Tensor:
    """Return the log-probabilities of each document alone, and check that nothing but the tokens before one changes them.

    Raises:
        UserError: later tokens or earlier documents change them.
    """
    found: dict[int, Tensor] = {}
    for index in sorted(range(len(documents)), key=lambda i: len(documents[i][0])):  # some rotary embeddings keep the longest length
        found[index] = _logprobs(model, documents[index][0])
    longest, shortest = (function(documents, key=lambda document: len(document[0])) for function in (max, min))
    again, expected = _logprobs(model, shortest[0]), found[[d is shortest for d in documents].index(True)]
    if not expected.isfinite().all():
        raise FloatingPointError("the logits of random weights are not finite")
    if _difference(again, expected) > tolerance:
        what = f"{type(model).__name__} computes another result when the same text is computed again"
        raise UserError(what, where=where, fix="choose a model whose code keeps nothing from one call to the next")
    changed = longest[0].copy()
    changed[-1] += 1 if changed[-1] == 0 else -1
    before = _logprobs(model, longest[0])[:-1]
    if _difference(_logprobs(model, changed)[:-1], before) > tolerance:
        raise _sees_later_tokens(model, where)
    return torch.cat([found[index] for index in range(len(documents))])


def _sees_later_tokens(model: PreTrainedModel, where: str) -> UserError:
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    what = f"{name} is no causal language model: the probability of a token depends on the tokens after it"
    fix = "choose a causal language model"
    if getattr(text, "use_bidirectional_attention", None):  # PaliGemma sets it by itself
        what += f"; the attention of its {text.model_type} is two-way (use_bidirectional_attention)"
        fix += "; of those that read pictures, such as Gemma 3 or Qwen2.5-VL"
    elif getattr(text, "is_decoder", None) is False:
        fix += f"; in the config.json of a {text.model_type}, set is_decoder to true"
    return UserError(what, where=where, fix=fix)


def _choose(twin: Twin, where: str) -> ForwardPath:
    before = plain.stepwise
    with watched() as calls:
        why = _why_not(twin, PACKED_PATH)
    if why is None:
        return replace(PACKED_PATH, fused=plain.stepwise == before, recurrent=calls.are_recurrent, rule=calls.rule)
    for own_logits in (False, True):
        for attention in dict.fromkeys((twin.attention, "eager")):
            path = ForwardPath(packed=False, attention=attention, own_logits=own_logits, why=why, rule=calls.rule)
            failure = _why_not(twin, path)
            if failure is None:
                return path
    raise UserError(f"this model cannot be computed exactly: {failure}", where=where, fix=USE_ANOTHER)


@torch.no_grad()
def _why_not(twin: Twin, path: ForwardPath) -> str | None:
    """Return why the twin cannot be computed this way, in a few words; None if it can."""
    try:
        scorer = TokenScorer(twin.make(path.attention), path=path).eval()
        batch = collate(twin.documents, range(len(twin.documents)))
        difference = _difference(scorer(batch).logprob_M, twin.expected_M)
        _train(scorer, batch)  # dropout of attention is off in evaluation
    except UserError as error:
        return error.what + (_without_dropout(scorer.model.config) if "dropout" in error.what else "")
    except Exception as error:  # the code of a model may raise anything where it does not expect packed documents
        if PACKED in str(error):  # its own table of attention functions lacks ours
            return NO_INTERFACE
        return f"{'packed documents make its code fail' if path.packed else 'its code fails'} ({_first_line(error)})"
    if difference <= TOLERANCES[twin.dtype]:
        return None
    kinds = sorted({type(module).__name__ for module in scorer.modules()}, key=lambda name: (name.endswith("Block"), len(name), name))
    if names := [name for name in kinds if RECURRENT.search(name) and not OTHER_PARTS.search(name)]:
        return f"{names[0]} carries its state into the next document, and packed documents need kernels that reset it"
    return f"packed attention does not have all of its attention (log-probabilities differ by {difference:.2g})"


# Prefixes that documents share

_whether_shared: dict[str, str | None] = {}  # by config: a run asks for each of its models
PROMPTS, ANSWERS = (20, 17), ((9, 2, 12), (1, 7))  # tokens of prompts, and of the answers to each; prompts are longer than windows


def why_not_shared(config: PretrainedConfig, where: str, *, trust_remote_code: bool = False) -> str | None:
    """Return why documents cannot share a prefix (`verl.data.groups`) in this architecture, in a few words; None if they can.

    A tiny twin must give the same log-probabilities and gradients with and without sharing. Every rank finds the same.
    """
    config = copy.deepcopy(config)
    # A loaded model's config has the attention of packed batches, and a twin's own code comes first; its weights may have 4 bits.
    config._attn_implementation = None
    vars(config).pop("quantization_config", None)
    key = config.to_json_string(use_diff=False)
    if key not in _whether_shared:
        with _quiet():
            _whether_shared[key] = _tried(config, where, trust_remote_code=trust_remote_code)
    return _whether_shared[key]


def _tried(config: PretrainedConfig, where: str, *, trust_remote_code: bool) -> str | None:
    try:
        twin = _make_twin(config, where, trust_remote_code=trust_remote_code)
    except UserError as error:  # a reward model may be no language model
        return error.what
    return _differs_if_shared(twin) if isinstance(twin, Twin) else f"no tiny twin of it can be tried ({_first_line(twin)})"


def _differs_if_shared(twin: Twin) -> str | None:
    documents, groups = list[Document](), []
    random = np.random.default_rng(0)
    vocabulary = twin.make(PACKED).config.get_text_config(decoder=True).vocab_size
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        ids = random.integers(0, vocabulary, prompt)
        whole = [np.concatenate([ids, random.integers(0, vocabulary, answer)]).astype(np.int32) for answer in answers]
        documents += [(each, np.arange(len(each)) >= prompt) for each in whole]
        groups.append(grouped(range(len(documents) - len(answers), len(documents)), documents.__getitem__))
    try:
        expected = _scores_and_gradients(twin, collate(documents, numbers_of(groups)))
        found = _scores_and_gradients(twin, collate_groups(groups, documents.__getitem__, multiple_of_tokens=16))
    except Exception as error:  # the code of a model may raise anything where it does not expect prefixes
        return f"shared prompts make its code fail ({_first_line(error)})"
    if not all(each.isfinite().all() for each in expected):
        return "the gradients of its tiny twin are not finite, so that sharing cannot be tried"
    difference = max(_difference(f, e) / max(1.0, float(e.abs().max())) for f, e in zip(found, expected, strict=True))
    return None if difference <= TOLERANCES[twin.dtype] else f"shared prompts change what it computes, by {difference:.2g}"


@torch.enable_grad()
def _scores_and_gradients(twin: Twin, batch: Batch) -> tuple[Tensor, Tensor]:
    scorer = TokenScorer(twin.make(PACKED)).eval()
    logprob_M = scorer(batch).logprob_M
    (logprob_M * torch.arange(1.0, len(logprob_M) + 1, dtype=logprob_M.dtype).sin()).sum().backward()
    return logprob_M.detach(), torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


@torch.enable_grad()
def _train(scorer: TokenScorer, batch: Batch) -> None:
    """Run the forward and backward pass of training. Embeddings are frozen, as they are beside adapters."""
    scorer.model.get_input_embeddings().requires_grad_(False)
    require_input_gradient(scorer.model)
    scorer.train()(batch).logprob_M.sum().backward()


def _without_dropout(config: PretrainedConfig) -> str:
    """Say which values of the config drop attention."""
    values = vars(config.get_text_config(decoder=True)).items()
    keys = [key for key, value in values if re.search("drop", key) and re.search("attn|attention", key) and value]
    return f"; with {' and '.join(f'{key}=0' for key in keys)} in its config.json it is packed" if keys else ""


def _logprobs(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """Return the log-probability of each token of a document but the first, by the model's own code."""
    ids_L = torch.from_numpy(ids).long().to(model.device)
    logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0]
    logprob_LV = (logits_LV if logits_LV.dtype == torch.float64 else logits_LV.float()).log_softmax(-1)
    logprob_L: Tensor = logprob_LV[:-1].gather(1, ids_L[1:, None]).squeeze(1)
    return logprob_L


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; infinite if there are values that are not numbers."""
    difference = (found - expected).abs().max().item()
    return float(difference) if difference == difference else float("inf")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of a twin's config, which is not the user's."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


# Checks of the model itself


@torch.no_grad()
def check_scorer(scorer: TokenScorer) -> None:
    """Compare the scorer's log-probabilities of two short documents in a batch with those of each document alone.

    This verifies that no token attends to another document, and that `LogitRule` is all that follows the output layer. The weights must be
    float32 and not sharded.

    Raises:
        UserError: they differ, or the model's code fails.
    """
    model, name = scorer.model, type(scorer.model).__name__
    device, training = model.device, model.training
    model.eval()
    documents = probe_documents(model.config.get_text_config(decoder=True).vocab_size)
    with _failures_of(model):
        found_M = scorer(collate(documents, [0, 1]).to(device)).logprob_M
        with _plain(scorer):
            expected_M = torch.cat([_logprobs(model, ids) for ids, _ in documents])
    model.train(training)
    difference = (found_M - expected_M).abs().max().item()
    if difference != difference:
        check_finite(model, model.name_or_path or name)
    if not difference < TOLERANCE:
        what, odd = f"the log-probabilities of {name} in packed batches differ from those of single documents", _odd_windows(model)
        fix = "correct it in config.json: a positive number of tokens, or null for no window" if odd else USE_ANOTHER
        raise UserError(f"{what} by {difference:.2g}{odd}", where="model.partial_pretrain", fix=fix)


def _odd_windows(model: PreTrainedModel) -> str:
    """Say which windows of attention in the config hold no token; "" if all do."""
    values = vars(model.config.get_text_config(decoder=True)).items()
    odd = [
        f"{name} is {value}" for name, value in values if WINDOW.search(name) and type(value) is int and value < 1 and "layer" not in name
    ]
    return f"; {' and '.join(odd)}" if odd else ""


@contextmanager
def _plain(scorer: Scorer) -> Iterator[None]:
    """In this context, the model computes by its own code."""
    model = scorer.model
    if not scorer.path.packed:
        yield
        return
    packed_attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(packed_attention)


@contextmanager
def _failures_of(model: PreTrainedModel) -> Iterator[None]:
    """Raise what the code of a model raises as a UserError."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the code of a model may raise anything
        what = f"the code of {type(model).__name__} fails on a short text: {_first_line(error)}"
        raise UserError(what, where="model.partial_pretrain", fix="check its config.json, or choose another model") from error


@torch.no_grad()
def check_parts(scorer: TokenScorer) -> None:
    """With context parallelism, compare this rank's slice of a batch with the whole batch. Every rank calls it.

    This verifies that only attention, which exchanges tokens between ranks, mixes tokens. The weights must be as in `check_scorer`.

    Raises:
        UserError: they differ.
    """
    if dist.context_size() == 1:
        return
    # The longer document comes last: wherever the batch is cut, some trained token then depends on tokens of another slice.
    documents = probe_documents(scorer.model.config.get_text_config(decoder=True).vocab_size)[::-1]
    whole = collate(documents, [0, 1], multiple_of_tokens=dist.context_size())
    part = whole.part(dist.context_rank(), dist.context_size())
    mine_M = torch.isin(whole.trained_M, part.trained_M + dist.context_rank() * len(part.input_ids_T))
    device, training = scorer.model.device, scorer.model.training
    scorer.model.eval()
    expected_M, found_M = scorer(whole.to(device)).logprob_M[mine_M.to(device)], scorer(part.to(device)).logprob_M
    scorer.model.train(training)
    if dist.any_rank(not bool(((found_M - expected_M).abs() < TOLERANCE).all())):
        raise UserError(
            f"{type(scorer.model).__name__} gives different log-probabilities when a document is split over several processes",
            where="model.context_parallel_size",
            fix="set it to 1, or choose a model such as Qwen2, Qwen3, Llama or Mistral",
        )


@torch.no_grad()
def check_hidden(scorer: Scorer, *, where: str) -> None:
    """Compare the last hidden states of two short documents in a batch with those of each document alone.

    This verifies for any architecture that no token attends to another document. The weights must be float32 and not sharded.

    Raises:
        UserError: they differ, or the model's code fails.
    """
    model = scorer.model
    training = model.training
    model.eval()
    documents = probe_documents(model.config.get_text_config(decoder=True).vocab_size)
    with _failures_of(model):
        found_TH = scorer.hidden(collate(documents, range(len(documents))).to(model.device))
        ids = [torch.from_numpy(ids).long().to(model.device) for ids, _ in documents]
        with _plain(scorer):
            expected_TH = torch.cat([decoder_of(model)(input_ids=ids_T[None], use_cache=False).last_hidden_state[0] for ids_T in ids])
    model.train(training)
    difference = ((found_TH - expected_TH).abs().max() / expected_TH.abs().max()).item()
    if not difference < TOLERANCE:
        what = f"the hidden states of {type(model).__name__} in packed batches differ from those of single documents"
        raise UserError(f"{what} by {difference:.2g}, relative to the largest value", where=where, fix=USE_ANOTHER)
