"""BM25: the training texts that share rare words with the query, whatever the model thinks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._trees import digest_of
from upweight.attributors.evidence import library_versions
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

Text = Sequence[Any]
"""A string, or a sequence of token ids."""

_WORD = re.compile(r"\w+")
_BATCH = 256


class BM25:
    """Lexical overlap of texts, a baseline that often beats gradients on text.

    ``scores[query, i] = sum over the query's tokens t of  idf_t tf_ti / (tf_ti + k1 (1 - b + b |i| / mean |i|))`` with
    ``idf_t = log(1 + (n - n_t + 1/2) / (n_t + 1/2))``: tf_ti counts t in text i, n_t the training texts with t, and |i|
    is the length of text i. Never negative; no unit.

    Args:
        model: accepted so that all attributors can be made alike, and not looked at.
        task: likewise.
        text: what to read of a batch, ``batch -> list of strings, or of sequences of token ids``; needed where tokens
            are too fine to match (characters: give their words). If None, a batch is a list of strings, or of token
            ids, or the first of a tuple, or ``input_ids`` (where ``attention_mask`` is not 0) of a dict.
        k1: how slowly repetitions of a token stop to count.
        b: how much long texts are discounted, 0 to 1.

    Cost: counting the tokens of the training texts once; a query touches only texts that share a token with it.

    Fails when: the tokens say little by themselves, or related texts use other words.

    Source: *The Probabilistic Relevance Framework: BM25 and Beyond* (Robertson and Zaragoza, 2009), in Lucene's form;
    computed by the library bm25s.

    Raises:
        ImportError: bm25s is missing (``pip install 'upweight[text]'``).

    Example:
        >>> import torch, upweight as uw
        >>> method = uw.BM25(torch.nn.Identity(), uw.Classification())
        >>> _ = method.fit(["The cat sat.", "A dog ran.", "The dog sat down."])
        >>> method.attribute(["dog!"]).top_k(3).ids
        [[1, 2, 0]]
    """

    def __init__(
        self,
        model: nn.Module | None,
        task: Task | None,
        *,
        text: Callable[[Any], Sequence[Text]] | None = None,
        k1: float = 1.5,
        b: float = 0.75,
    ) -> None:
        if not (k1 > 0 and 0 <= b <= 1):
            raise UpweightError(f"k1={k1} and b={b}, expected k1 > 0 and b from 0 to 1 -> 1.5 and 0.75")
        self.model, self.task, self.text, self.k1, self.b = model, task, text, k1, b
        self._library = _import()
        self._index: Any = None
        self._vocabulary: dict[str, int] = {}
        self._ids: list[Any] = []
        self._fingerprint = ""

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> BM25:
        """Count the tokens of the training texts.

        Args:
            train: a list of strings or of sequences of token ids; or a Dataset, a DataLoader or tensors that hold
                texts.
            ids: one id per text; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: no texts are found in the data, or none of them holds a token.
        """
        texts, self._ids = self._read(train, ids)
        vocabulary: dict[str, int] = {}
        numbers = [[vocabulary.setdefault(token, len(vocabulary)) for token in text] for text in texts]
        if not vocabulary:
            raise UpweightError("no training text holds a token -> look at what text= returns")
        self._vocabulary = vocabulary
        self._index = self._library.BM25(method="lucene", k1=self.k1, b=self.b, dtype="float64")
        self._index.index((numbers, dict(vocabulary)), show_progress=False)
        self._fingerprint = _fingerprint(texts)
        return self

    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """Score every training text for every query.

        Args:
            query: queries in any of the forms that `fit` takes.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], float32, without a unit; 0 where no token is shared.

        Raises:
            UpweightError: not fitted, or no texts are found in the queries.
        """
        self._ready()
        texts, names = self._read(query, ids)
        values = np.zeros((len(texts), len(self._ids)), np.float32)
        for row, text in zip(values, texts):
            known = [self._vocabulary[token] for token in text if token in self._vocabulary]
            if known:
                row[:] = self._index.get_scores_from_ids(known)
        info = {
            "method": "bm25",
            "higher_is_better": self.task.higher_is_better if self.task is not None else False,
            "convention": "positive = proponent: the texts share tokens",
            "n": len(self._ids),
            "tokens": len(self._vocabulary),
            "k1": self.k1,
            "b": self.b,
            "fingerprints": {"train": self._fingerprint},
            "texts": _fingerprint(texts),
            "versions": {**library_versions(), "bm25s": self._library.__version__},
        }
        return Scores(torch.from_numpy(values), names, self._ids, None, info)

    def self_influence(self) -> SelfInfluence:
        """Refused: how a text matches itself says only how long it is and how rare its words are.

        Raises:
            UpweightError: always.
        """
        self._ready()
        raise UpweightError(
            "BM25 has no self-influence: a text's match with itself says only how long it is and how rare its words "
            "are -> use Loss, whose self score tells suspicious examples apart"
        )

    def _ready(self) -> None:
        if self._index is None:
            raise UpweightError("not fitted yet -> call fit(train) first")

    def _read(self, data: Any, ids: Sequence[int | str] | None) -> tuple[list[list[str]], list[Any]]:
        """Tokens of every text, and the ids."""
        if self.text is None and isinstance(data, (list, tuple)) and all(_is_text(item) for item in data):
            texts = [_tokens(item) for item in data]
            # Only for what it refuses: no texts, repeated ids.
            examples = Examples(torch.zeros(len(texts)), ids)
        else:
            examples = Examples(data, ids)
            texts = [_tokens(text) for batch in self._batches(examples) for text in batch]
        if len(texts) != examples.n:
            raise UpweightError(
                f"{len(texts)} texts were read of {examples.n} examples, expected one each -> let text= return a list "
                "with one text an example"
            )
        return texts, list(examples.ids)

    def _batches(self, examples: Examples) -> Iterator[Sequence[Text]]:
        for rows in examples.batches(_BATCH):
            yield _texts_of(rows.batch) if self.text is None else self.text(rows.batch)


def _texts_of(batch: Any) -> Sequence[Text]:
    """Strings or token ids of a batch, where they are plain to see."""
    found, mask = batch, None
    if isinstance(batch, Mapping):
        found, mask = batch.get("input_ids", batch.get("text")), batch.get("attention_mask")
    elif isinstance(batch, (tuple, list)) and batch and not all(_is_text(item) for item in batch):
        found = batch[0]
    if isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point():
        kept = torch.ones_like(found, dtype=torch.bool) if mask is None else mask.bool()
        return [row[keep].tolist() for row, keep in zip(found, kept)]
    if isinstance(found, (list, tuple)) and all(_is_text(item) for item in found):
        return found
    seen = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise UpweightError(
        f"no texts are found in the data ({seen}), expected strings or integer token ids [batch, position] -> pass "
        "text=, a function from a batch to its texts"
    )


def _is_text(item: Any) -> bool:
    """Whether an item is one text: a string, or a sequence of integers."""
    if isinstance(item, str):
        return True
    if isinstance(item, (Tensor, np.ndarray)):
        return item.ndim == 1 and not torch.as_tensor(item).is_floating_point()
    return isinstance(item, (list, tuple)) and all(isinstance(token, (int, np.integer)) for token in item)


def _tokens(text: Text) -> list[str]:
    """Lower-case words of a string, or token ids as they are."""
    if isinstance(text, str):
        return _WORD.findall(text.lower())
    numbers = text.tolist() if isinstance(text, (Tensor, np.ndarray)) else text
    return [str(int(number)) for number in numbers]


def _fingerprint(texts: Sequence[Sequence[str]]) -> str:
    content = "\n".join(" ".join(text) for text in texts).encode()
    return digest_of(torch.frombuffer(bytearray(content or b"\n"), dtype=torch.uint8))


def _import() -> Any:
    try:
        return importlib.import_module("bm25s")
    except ImportError as error:
        raise ImportError("BM25 needs bm25s -> pip install 'upweight[text]'") from error
