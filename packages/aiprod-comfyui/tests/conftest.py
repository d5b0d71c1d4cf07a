"""The nodes as ComfyUI loads them, and of ComfyUI only what they call.

The model is that of the pipelines' tests, made by their own code.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1]
PIPELINES_TESTS = FOLDER.parent / "aiprod-pipelines" / "tests"


def load(name: str, path: Path) -> ModuleType:
    """A package or a file by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nodes() -> dict[str, Any]:
    """Node classes by the names that workflows use."""
    return load("aiprod_comfyui", FOLDER / "__init__.py").NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and all that belongs beside it."""
    made = load("tiny_family", PIPELINES_TESTS / "conftest.py")
    folder = tmp_path_factory.mktemp("family")
    made.save_tiny_model(folder)
    made.save_tiny_upsampler(folder / "tiny-spatial-upscaler-x2-1.0.safetensors")
    made.save_tiny_lora(folder / "tiny-distilled-lora-2.safetensors")
    made.save_tiny_lora(folder / "tiny-ic-lora-canny-control.safetensors")
    made.save_tiny_lora(folder / "style.safetensors")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPROD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def comfy(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: dict[str, Any]
) -> SimpleNamespace:
    """ComfyUI's folders, progress bars and interruption; `nodes` come before, without it."""
    state = SimpleNamespace(bars=[], is_interrupted=lambda: False)
    state.input, state.output, state.temp = (tmp_path / n for n in ("input", "output", "temp"))
    for folder in (state.input, state.output, state.temp):
        folder.mkdir()

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total, self.done = total, 0
            state.bars.append(self)

        def update(self, value: int) -> None:
            self.done += value

    class Interrupted(Exception):
        pass

    def check() -> None:
        if state.is_interrupted():
            raise Interrupted

    files = {
        "checkpoints": ["tiny-dev.safetensors"],
        "diffusion_models": [],
        "loras": ["style.safetensors"],
    }

    def save_path(prefix: str, root: str, width: int, height: int):
        subfolder, _, name = prefix.rpartition("/")
        folder = Path(root) / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder), name, len(list(folder.iterdir())) + 1, subfolder, prefix

    state.Interrupted = Interrupted
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": check,
            "get_torch_device": lambda: "cpu",
            "unload_all_models": lambda: None,
            "soft_empty_cache": lambda: None,
        },
        "folder_paths": {
            "get_filename_list": lambda kind: files[kind],
            "get_full_path_or_raise": lambda kind, name: str(family / name),
            "get_output_directory": lambda: str(state.output),
            "get_temp_directory": lambda: str(state.temp),
            "get_save_image_path": save_path,
        },
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return state
