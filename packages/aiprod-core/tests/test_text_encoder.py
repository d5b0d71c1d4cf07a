import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_text_encoder
from aiprod_core.model.text_encoder import GemmaEncoder, MiniLMEncoder

aiprod_nano = pytest.importorskip("aiprod_nano")
MINILM = Path(aiprod_nano.__file__).parent / "text_encoder"

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "red", "ball", "rolls", "left", "right"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder.load(MINILM)


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory):
    """A random Gemma 3 of width 16 with a word tokenizer that adds its own BOS, as Gemma's does."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Gemma3TextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(gemma_folder):
    return GemmaEncoder.load(gemma_folder, max_length=12, dtype=torch.float32)


def test_minilm_gives_the_embedding_and_every_layer_right_padded(minilm):
    states, mask = minilm.encode(["a red ball", "a dog runs along the beach at sunset"])
    assert states.shape == (2, 64, 384, 7)
    assert mask.sum(dim=1).tolist() == [5, 10]  # [CLS] and [SEP] count
    assert mask[:, 0].tolist() == [1, 1]
    assert (states[mask == 0] == 0).all()


def test_minilm_puts_similar_sentences_closer_than_different_ones(minilm):
    states, mask = minilm.encode(
        ["a dog runs on the beach", "a puppy is sprinting along the sea shore", "stock prices fell"]
    )
    pooled = (states[..., -1] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    similar = cosine_similarity(pooled[0], pooled[1], dim=0)
    different = cosine_similarity(pooled[0], pooled[2], dim=0)
    assert similar > 0.5 > 0.3 > different


def test_minilm_states_do_not_depend_on_the_longest_text_of_the_batch(minilm):
    alone, _ = minilm.encode(["rain on a tin roof"])
    together, _ = minilm.encode(["rain on a tin roof", "word " * 40])
    # float32 sums in another order; the states reach 10.
    torch.testing.assert_close(alone[0], together[0], atol=1e-4, rtol=1e-4)


def test_minilm_truncates_long_texts_and_keeps_the_final_separator(minilm):
    states, mask = minilm.encode(["ball " * 500])
    assert states.shape[1] == 64
    assert mask.sum() == 64
    assert minilm.tokenizer.encode("ball " * 500).tokens[-1] == "[SEP]"


def test_minilm_loads_and_encodes_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    states, _ = MiniLMEncoder.load(MINILM, max_length=8).encode(["a red ball"])
    assert states.shape == (1, 8, 384, 7)


def test_a_checkpoint_names_the_encoder_in_the_folder_beside_it(tmp_path, minilm):
    config = {"text_encoder": {"type": "minilm", "max_length": 16}}
    path = tmp_path / "nano.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"config": json.dumps(config)})
    (tmp_path / "text_encoder").symlink_to(MINILM)
    states, mask = load_text_encoder(open_checkpoint(path)).encode(["a red ball"])
    wanted, _ = minilm.encode(["a red ball"])
    torch.testing.assert_close(states, wanted[:, :16])
    assert mask.shape == (1, 16)


def test_minilm_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        MiniLMEncoder.load(tmp_path)


def test_importing_the_encoders_does_not_import_transformers():
    code = "import sys, aiprod_core.model.text_encoder; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gemma_tokens_are_left_padded_with_one_bos_and_no_eos(gemma):
    token_ids, mask = gemma.tokenize(["  red ball ", "red ball rolls left " * 10])
    assert token_ids[0].tolist() == [0] * 9 + [1, 4, 5]
    assert mask[0].tolist() == [0] * 9 + [1] * 3
    assert token_ids[1].tolist() == [1, *([4, 5, 6, 7] * 3)[:11]]


def test_gemma_keeps_all_hidden_states_and_the_last_is_normalised(gemma):
    states, mask = gemma.encode(["red ball rolls", "left"])
    assert states.shape == (2, 12, gemma.hidden_size, gemma.num_states) == (2, 12, 16, 4)
    embedding = gemma.model.embed_tokens(gemma.tokenize(["red ball rolls", "left"])[0])
    torch.testing.assert_close(states[..., 0], embedding)
    valid = states[..., -1][mask == 1]
    rms = valid.pow(2).mean(dim=-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-4, rtol=1e-4)


def test_gemma_states_do_not_depend_on_the_amount_of_padding(gemma_folder, gemma):
    longer = GemmaEncoder.load(gemma_folder, max_length=20, dtype=torch.float32)
    short, _ = gemma.encode(["red ball rolls left"])
    long, _ = longer.encode(["red ball rolls left"])
    torch.testing.assert_close(short[:, -5:], long[:, -5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.", "model.language_model."])
def test_gemma_loads_from_each_published_prefix(gemma_folder, gemma, tmp_path, prefix):
    for file in gemma_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(gemma_folder / "model.safetensors")
    renamed = {prefix + name: tensor for name, tensor in weights.items()}
    renamed["vision_tower.patch.weight"] = torch.zeros(2)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GemmaEncoder.load(tmp_path, max_length=12, dtype=torch.float32)
    torch.testing.assert_close(loaded.encode(["red"])[0], gemma.encode(["red"])[0])


def test_gemma_weights_that_lack_a_tensor_are_refused_by_name(gemma_folder, tmp_path):
    for file in gemma_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(gemma_folder / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        GemmaEncoder.load(tmp_path)


def test_another_model_size_or_tokenizer_is_refused_before_weights_are_read(gemma_folder, tmp_path):
    # The folder has no weights at all, so each complaint comes before they are looked for.
    config = json.loads((gemma_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma4"}))
    with pytest.raises(CheckpointError, match='model_type "gemma4"'):
        GemmaEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expects 188160 features"):
        GemmaEncoder.load(tmp_path, num_features=3840 * 49)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        GemmaEncoder.load(tmp_path, num_features=16 * 4)


def test_a_gated_repository_is_explained_in_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(InputError, match="access is gated; accept the licence"):
        GemmaEncoder.load("google/gemma-3-12b-it")
