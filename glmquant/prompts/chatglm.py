"""ChatGLM-6B's prompt: the bare query, or numbered rounds from 0; special tokens behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from ..errors import UsageError
from ..tokenizers.kind import Kind
from .base import Sampling, Turn, TurnPrompt

# ASCII marks that become full-width beside a Chinese character.
_MARKS = dict(zip(",!:;?", "，！：；？", strict=True))
_CHINESE = "[\u4e00-\u9fff]"
# Text that spells a piece for white space.
_WHITE_SPACE = re.compile(r"<n>|<\|tab\|>|<\|blank_\d+\|>")


class ChatGLMPrompt(TurnPrompt):
    """ChatGLM-6B. History: a list of (query, answer)."""

    kind: ClassVar[Kind] = "chatglm"
    name = "ChatGLM-6B"
    sampling = Sampling(max_length=2048, top_p=0.7, temperature=0.95)
    stop_tokens = ("<eop>",)
    fallback = 5

    def text(self, query: str, history: Sequence[Turn]) -> str:
        """The prompt as text; a first query stands alone."""
        if not history:
            return query
        rounds = [f"[Round {i}]\n问：{asked}\n答：{answer}\n" for i, (asked, answer) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："

    def ids(self, query: str, history: list[Turn], role: str = "user") -> list[int]:
        """The text, then ``[gMASK] <sop>``."""
        text = self.text(self._checked(query, role), history)
        return [*self._encode(text), self.token("[gMASK]"), self.token("<sop>")]

    def check(self, ids: Sequence[int]) -> None:
        """Positions are counted from ``<sop>`` and from ``[gMASK]``, or ``[MASK]``."""
        if self.token("<sop>") not in ids or not {self.token("[gMASK]"), self.token("[MASK]")} & set(ids):
            raise UsageError(
                f"these ids are no prompt of {self.name}: it ends in [gMASK] <sop>, and has {self.token('[gMASK]')} "
                f"and {self.token('<sop>')} for them."
            )

    def _encode(self, text: str) -> list[int]:
        if self.encode_special_tokens:
            return self.plain(text)
        # The vocabulary has pieces such as <n> for white space, which also match where a user spells them.
        # Cut inside such a spelling, it matches no more. What follows a cut is encoded behind a line break,
        # because SentencePiece imagines a space in front of every text.
        cuts = [found.start() + 1 for found in _WHITE_SPACE.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        line_break = self.token("<n>")
        ids = self.plain(parts[0])
        for part in parts[1:]:
            behind = self.plain("\n" + part)
            ids += behind[behind.index(line_break) + 1 :]
        return ids

    def process(self, text: str) -> str:
        """Strip, fill in the training time, and write marks beside Chinese characters full-width."""
        text = text.strip().replace("[[训练时间]]", "2023年")
        for mark, wide in _MARKS.items():
            text = re.sub(f"(?<={_CHINESE}){re.escape(mark)}", wide, text)
            text = re.sub(f"{re.escape(mark)}(?={_CHINESE})", wide, text)
        return text
