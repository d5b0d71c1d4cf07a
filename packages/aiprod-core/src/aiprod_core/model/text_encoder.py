"""From text to the hidden states of a frozen language model.

Both encoders do the same: tokenise, run the body without an output head, and return every hidden
state, the embedding first. A video model is trained on top of one of them, so its checkpoint says
which; they are not interchangeable. The heavy imports (transformers takes seconds) happen when an
encoder is loaded, not when this file is imported.

Letters: B texts, S tokens, D width of the language model, L hidden states (its layers + 1).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint

GEMMA_HUB_ID = "google/gemma-3-12b-it"

# The language model sits under a different prefix in each class that Gemma 3 is saved from.
_GEMMA_KEYS = {
    r"^language_model\.model\.": "",
    r"^model\.language_model\.": "",
    r"^language_model\.": "",
    r"^model\.": "",
}


class GemmaEncoder:
    """Gemma 3's language model, as LTX-2 and 2.3 use it: left-padded, all hidden states kept.

    `tokenizer` and `model` are transformers objects; `load` reads both from a folder.
    """

    def __init__(self, tokenizer: Any, model: Any, max_length: int = 1024):
        self.tokenizer = tokenizer
        self.model = model
        self.max_length = max_length
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id
        if self.pad_id is None or tokenizer.bos_token_id is None:
            raise CheckpointError("text encoder: the tokenizer names no bos or pad token")

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        max_length: int = 1024,
        num_features: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> "GemmaEncoder":
        """Loads from a folder or a hub id. `num_features` is the D * L that the checkpoint expects.

        Everything that can be wrong is looked at before weights are read or fetched: raises
        InputError for a missing or gated repository, CheckpointError for another model, another
        size, a missing tokenizer and weights that do not fill the model.
        """
        folder = Path(source)
        if not folder.exists():
            folder = _fetch(str(source), ["*.json", "tokenizer.model"])
        if not folder.is_dir():
            raise InputError(f"{source}: give Gemma's folder, not one of its files")
        config = _gemma_config(folder, num_features)
        tokenizer = _gemma_tokenizer(folder)
        if not Path(source).exists():
            folder = _fetch(str(source), ["*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder}: no safetensors weights; fetch the folder again")

        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

        # `loaded` is a pair because of output_loading_info, which the annotation does not know.
        loaded: Any = Gemma3TextModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            key_mapping=_GEMMA_KEYS,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:6])
            raise CheckpointError(
                f"{folder}: {len(report['missing_keys'])} tensors are missing: {some}. "
                "Fetch the folder again."
            )
        return cls(tokenizer, model.eval().requires_grad_(False).to(device), max_length)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_states(self) -> int:
        return self.model.config.num_hidden_layers + 1

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, max_length): one leading BOS, no EOS, padding on the left."""
        rows = []
        for text in texts:
            ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            rows.append([self.tokenizer.bos_token_id, *ids][: self.max_length])
        token_ids = torch.full((len(rows), self.max_length), self.pad_id)
        mask = torch.zeros_like(token_ids)
        for i, row in enumerate(rows):
            token_ids[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = 1
        return token_ids, mask

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, D, L), zero on padding of all texts, and mask (B, S), 1 on tokens.

        S is `max_length`. The body runs on the longest text only, at the positions that it has
        behind the padding; nothing downstream reads the rest.
        """
        token_ids, mask = (rows.to(self.model.device) for rows in self.tokenize(texts))
        padding = self.max_length - int(mask.sum(dim=1).max())
        output = self.model(
            input_ids=token_ids[:, padding:],
            attention_mask=mask[:, padding:],
            position_ids=torch.arange(padding, self.max_length, device=mask.device)[None],
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.stack(output.hidden_states, dim=-1)
        return torch.nn.functional.pad(states, (0, 0, 0, 0, padding, 0)), mask


class MiniLMEncoder:
    """all-MiniLM-L6-v2, the small encoder of our own models; right-padded, float32 on the CPU.

    `load` reads `config.json`, `tokenizer.json` and `model.safetensors` from a folder.
    """

    def __init__(self, tokenizer: Any, model: Any, max_length: int = 64):
        self.tokenizer = tokenizer
        self.model = model
        self.max_length = max_length
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        max_length: int = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "MiniLMEncoder":
        """Loads from a folder, never from a network.

        Raises CheckpointError for a missing file or weights that do not fit the config.
        """
        folder = Path(folder)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: the text encoder's {name} is missing")

        from tokenizers import Tokenizer
        from transformers.models.bert.configuration_bert import BertConfig
        from transformers.models.bert.modeling_bert import BertModel

        config = BertConfig(**_read_json(folder / "config.json"))
        if max_length > config.max_position_embeddings:
            raise CheckpointError(
                f"text_encoder max_length is {max_length}, but the encoder in {folder} "
                f"has {config.max_position_embeddings} positions"
            )
        model: Any = BertModel(config, add_pooling_layer=False)
        weights = open_checkpoint(folder / "model.safetensors")
        try:
            model.load_state_dict(weights.read(weights.tensors), strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {error}"
            ) from error
        model = model.eval().requires_grad_(False).to(device, dtype)
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), model, max_length)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_states(self) -> int:
        return self.model.config.num_hidden_layers + 1

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, D, L), zero on padding, and mask (B, S); S is `max_length`."""
        rows = [row.ids for row in self.tokenizer.encode_batch([text.strip() for text in texts])]
        longest = max(map(len, rows))
        token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        token_ids, mask = token_ids.to(self.model.device), mask.to(self.model.device)
        output = self.model(input_ids=token_ids, attention_mask=mask, output_hidden_states=True)
        states = torch.stack(output.hidden_states, dim=-1) * mask[:, :, None, None]  # (B, S, D, L)
        # The body runs on the longest text only; nothing downstream reads the rest.
        padding = self.max_length - longest
        states = torch.nn.functional.pad(states, (0, 0, 0, 0, 0, padding))
        return states, torch.nn.functional.pad(mask, (0, padding))


TextEncoder = GemmaEncoder | MiniLMEncoder


def _gemma_config(folder: Path, num_features: int | None) -> Any:
    """The language model's part of config.json. Raises CheckpointError for anything but Gemma 3."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; give the folder of {GEMMA_HUB_ID}")
    section = _read_json(folder / "config.json")
    kind = section.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise CheckpointError(
            f'{folder}: config.json has model_type "{kind}", which is not supported; '
            f"this checkpoint was trained with Gemma 3, give {GEMMA_HUB_ID}"
        )

    from transformers.models.gemma3.configuration_gemma3 import Gemma3Config, Gemma3TextConfig

    config: Any = (
        Gemma3Config(**section).text_config if kind == "gemma3" else Gemma3TextConfig(**section)
    )
    found = config.hidden_size * (config.num_hidden_layers + 1)
    if num_features is not None and found != num_features:
        raise CheckpointError(
            f"{folder}: this Gemma has {config.num_hidden_layers + 1} hidden states of width "
            f"{config.hidden_size} ({found} features a token), the checkpoint expects "
            f"{num_features} features; LTX-2 and 2.3 need {GEMMA_HUB_ID}"
        )
    return config


def _gemma_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder}: no tokenizer.json or tokenizer.model; fetch them from {GEMMA_HUB_ID} too"
        )

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    """Downloads part of a hub repository, or finds it in the cache. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{hub_id}: access is gated; accept the licence on its hub page, run `hf auth login`, "
            "and try again, or give a folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{hub_id}: neither a folder on this machine nor a hub repository; "
            f"give a folder or {GEMMA_HUB_ID}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{hub_id}: no such folder, and the hub cannot be reached; give a folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}). Fetch it again.") from error
