"""Texts as the tokens of a model. The API and the workers encode with this module, so that both see the same tokens.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Encoding, Tokenizer

from service.errors import InvalidInput
from service.kit.separator import Separator, possible_separators
from service.kit.text import RenderedText, Span

_ORDINARY_TEXT = "a"
_LONG_TEXT = 10_000  # characters


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, with the limits of its model."""

    tokenizer: Tokenizer
    positions: int  #: the model's context length
    vocabulary: int  #: the rows of the model's embedding; the tokenizer can have more tokens

    def __post_init__(self) -> None:
        self.tokenizer.no_truncation()  # a tokenizer's file may turn these on
        self.tokenizer.no_padding()

    def encode(self, text: str, field: str = "prompt") -> tuple[list[int], list[Span]]:
        """Return the token ids of a text that will be continued, and their character offsets.

        The tokens that the tokenizer adds before a text are included, unless the text begins with them. Those that it
        adds after a text are not: they would end it. A rendered text has none of either. Raise InvalidInput for a token
        that the model does not have.
        """
        if isinstance(text, RenderedText):
            return self._encode_rendered(text, field)
        encoding = self.tokenize(text)
        prefix = next((i for i, added in enumerate(encoding.special_tokens_mask) if not added), None)
        if prefix is None:  # an empty text
            leading = self._leading_ids
            return leading, [(0, 0)] * len(leading)
        end = len(encoding.ids) - next(
            i for i, added in enumerate(reversed(encoding.special_tokens_mask)) if not added
        )
        ids, offsets = encoding.ids[:end], encoding.offsets[:end]
        if ids[prefix : 2 * prefix] == ids[:prefix]:
            ids, offsets = ids[prefix:], offsets[prefix:]
        if max(ids) >= self.vocabulary:
            self.check_ids(ids, field)
        return ids, offsets

    def _encode_rendered(self, text: RenderedText, field: str) -> tuple[list[int], list[Span]]:
        encoding = self.tokenize(text, add_special_tokens=False)
        if max(encoding.ids, default=0) >= self.vocabulary:
            self.check_ids(encoding.ids, field)
        return encoding.ids, encoding.offsets

    def tokenize(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Return the encoding of a whole text. Other threads run while a long text is tokenized."""
        if len(text) < _LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        # of the two only this method releases the lock of the interpreter
        return self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def check_characters(self, text: str, field: str) -> None:
        """Raise InvalidInput for a text that is too long whatever its tokens are. It is not tokenized."""
        limit = self.positions * self._longest_token
        if len(text) > limit:
            raise InvalidInput(
                f"the text has {len(text)} characters, and the model's {self.positions} positions hold at most {limit}: "
                "shorten it.",
                field,
            )

    def check_ids(self, ids: Sequence[int], field: str = "prompt") -> None:
        """Raise InvalidInput if the model or its tokenizer does not have one of the tokens."""
        for token_id in ids:
            token = self.tokenizer.id_to_token(token_id)
            if token is None:
                raise InvalidInput(f"the model's tokenizer has no token {token_id}: leave it out.", field)
            if token_id >= self.vocabulary:
                raise InvalidInput(
                    f"the model has no embedding for the token {token_id} ({token!r}), which its tokenizer has: write "
                    "the text without it.",
                    field,
                )

    def check(self, prompt: str, target: str | None = None, separator: Separator | None = None) -> None:
        """Raise InvalidInput for a prompt that is too long, or a target that is lost or merges with the prompt.

        Where the model chooses between two spellings, one of them must be usable.
        """
        ids, _ = self.encode(prompt)
        if len(ids) >= self.positions:
            raise InvalidInput(
                f"the prompt has {len(ids)} tokens and the model has {self.positions} positions: shorten it to at most "
                f"{self.positions - 1} tokens.",
                "prompt",
            )
        if target is None:
            return
        self._usable_separators(prompt, ids, target, separator)

    def usable_separators(self, prompt: str, target: str, given: Separator | None = None) -> list[Separator]:
        """Return the possible separators with which the target can be scored, the more usual one first. Raise
        InvalidInput if there is none."""
        return self._usable_separators(prompt, self.encode(prompt)[0], target, given)

    def _usable_separators(
        self, prompt: str, ids: Sequence[int], target: str, given: Separator | None
    ) -> list[Separator]:
        usable: list[Separator] = []
        first_error: InvalidInput | None = None
        for separator in possible_separators(prompt, target, given):
            try:
                self._check_joint(prompt, ids, separator, target)
            except InvalidInput as error:
                first_error = first_error or error
            else:
                usable.append(separator)
        if first_error is not None and not usable:
            raise first_error
        return usable

    def _check_joint(self, prompt: str, ids: Sequence[int], separator: Separator, target: str) -> None:
        """Check the target after a prompt with the tokens `ids`."""
        joint, _ = self.encode(prompt + separator + target, "target")
        target_ids = joint[len(ids) :]
        if joint[: len(ids)] != ids or not target_ids:
            raise InvalidInput(
                f"the target {target!r} merges with the end of the prompt when tokenised: end the prompt at a word "
                "boundary.",
                "target",
            )
        decoded_target = self.tokenizer.decode(target_ids, skip_special_tokens=True).strip()
        if decoded_target != target.strip():
            raise InvalidInput(
                f"the model's tokenizer cannot represent the target {target!r}: it decodes to {decoded_target!r}. "
                "Write it with other characters.",
                "target",
            )
        if len(joint) > self.positions:
            raise InvalidInput(
                f"prompt and target have {len(joint)} tokens and the model has {self.positions} positions: shorten them.",
                "prompt",
            )

    def check_plain(self, text: str, field: str) -> None:
        """Raise InvalidInput if a text contains a special token, such as the end of a text or of a chat message."""
        normalized_text = self._normalize(text)
        # the token of unknown words is special too, and its name does not occur in their text
        found = {
            token_id: name
            for token_id, name in self._special_tokens.items()
            if name in text or self._normalized_special_tokens[token_id] in normalized_text
        }
        if not found:
            return
        for token_id in self.tokenize(text, add_special_tokens=False).ids:
            if token_id in found:
                raise InvalidInput(
                    f"`{field}` contains {found[token_id]!r}, a special token of the model's tokenizer: remove it.",
                    field,
                )

    def _normalize(self, text: str) -> str:
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    @cached_property
    def _normalized_special_tokens(self) -> Mapping[int, str]:
        return {i: self._normalize(name) for i, name in self._special_tokens.items()}

    @cached_property
    def _special_tokens(self) -> Mapping[int, str]:
        decoder = self.tokenizer.get_added_tokens_decoder()
        return {i: token.content for i, token in decoder.items() if token.special}

    @cached_property
    def _longest_token(self) -> int:
        """The characters of the longest token, with a space that a tokenizer removes."""
        return 1 + max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _leading_ids(self) -> list[int]:
        """The tokens that the tokenizer adds before a text."""
        encoding = self.tokenizer.encode(_ORDINARY_TEXT)
        return encoding.ids[: encoding.special_tokens_mask.index(0)]
