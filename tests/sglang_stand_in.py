"""A stand-in for an SGLang server, with a small model behind it."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SAMPLING_KEYS = {
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_token_ids", "sampling_seed",
}  # fmt: skip


class StandIn:
    """Answers as SGLang's documentation and source say, one token after the other."""

    def __init__(self, path: Path, **settings: Any):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.settings = {"version": "0.5.23", "context_length": None, **settings}
        self.about = {"model_path": str(path), "served_model_name": str(path), "tokenizer_path": str(path), "weight_version": "default"}
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []

    def answer(self, place: str, body: Any) -> tuple[int, Any]:
        self.calls.append(place)
        if place == "/model_info":
            return 200, self.about
        if place == "/server_info":
            return 200, self.settings
        if place == "/generate":
            return self.generate(body)
        if place == "/update_weights_from_disk":
            return self.load(body)
        return (200, "") if place in ("/release_memory_occupation", "/resume_memory_occupation") else (404, {"detail": "Not Found"})

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        params = body["sampling_params"]
        assert set(body) == {"input_ids", "sampling_params", "return_logprob"} and set(params) <= SAMPLING_KEYS
        assert params["top_k"] == -1 or params["top_k"] >= 1
        self.requests.append(body)
        temperature, drawn = params["temperature"] or 1.0, []
        generator = torch.Generator().manual_seed(params.get("sampling_seed", time.time_ns()))
        ids, reason = list(body["input_ids"]), {"type": "length", "length": params["max_new_tokens"]}
        for _ in range(params["max_new_tokens"]):
            with torch.no_grad():
                logprob_V = (self.model(torch.tensor([ids])).logits[0, -1].float() / temperature).log_softmax(-1)
            sampled = int(torch.multinomial(logprob_V.exp(), 1, generator=generator))
            token = sampled if params["temperature"] > 0 else int(logprob_V.argmax())
            ids.append(token)
            drawn.append([float(logprob_V[token]), token, None])
            if token in params["stop_token_ids"]:
                reason = {"type": "stop", "matched": token}
                break
        about = {"finish_reason": reason, "output_token_logprobs": drawn, "weight_version": self.about["weight_version"]}
        return 200, {"text": "", "output_ids": [token for _, token, _ in drawn], "meta_info": about}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        if not files:
            return 400, {"success": False, "message": "Failed to get weights iterator", "num_paused_requests": 0}
        for file in files:
            self.model.load_state_dict(load_file(file), strict=False)
        self.model.tie_weights()
        name = body["model_path"]
        self.about |= {"model_path": name, "served_model_name": name, "weight_version": body["weight_version"]}
        return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
