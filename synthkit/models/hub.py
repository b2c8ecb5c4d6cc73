"""Models from the Hugging Face hub: a repository with card.yaml and safetensors weights."""

from __future__ import annotations

from pathlib import Path

from synthkit.errors import ModelError

# Only these are fetched: no pickle ever comes from the hub.
PATTERNS = ["card.yaml", "card.yml", "card.json", "student.safetensors", "model.safetensors", "*.safetensors"]


def fetch(spec: str) -> Path:
    """Local folder of `hf:REPO[@REV]` (downloaded once, then from the hub's own cache).

    Raises:
        ModelError: huggingface_hub is not installed, or the repository cannot be had.
    """
    repo, _, revision = spec.removeprefix("hf:").partition("@")
    if not repo:
        raise ModelError("model: the repository is missing after hf:", got=spec, hint="hf:OWNER/NAME[@REVISION]")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ModelError(
            f"{spec}: huggingface_hub is not installed", hint="pip install synthkit[hub], or give a local card or file"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{spec}: cannot get the repository ({reason})", hint="check the name and the network"
        ) from None
    return Path(folder)
