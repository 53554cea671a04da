"""The colours of cascades on the pages of the site."""

from __future__ import annotations

from pygments.lexer import RegexLexer, words
from pygments.token import Comment, Keyword, Name, Number, Operator, Text

from cascade.ops import FUNCTIONS, LIBRARY_REDUCTIONS, REDUCERS, WORDS


class CascadeLexer(RegexLexer):
    """Words, reducers, functions, tensors and numbers; everything that is a word of the language is known from it."""

    name = "cascade"
    aliases = ("cascade",)
    filenames = ("*.cascade",)
    tokens = {  # noqa: RUF012  (the form that Pygments asks for)
        "root": [
            (r"#[^\n]*", Comment.Single),
            (words(WORDS, prefix=r"\b", suffix=r"\b"), Keyword),
            (words((*REDUCERS, *LIBRARY_REDUCTIONS, "topk"), prefix=r"\b", suffix=r"(?=\[)"), Keyword.Pseudo),
            (words(tuple(FUNCTIONS), prefix=r"\b", suffix=r"(?=\()"), Name.Builtin),
            (r"[A-Za-z_]\w*'?(?=\[)", Name.Function),
            (r"[A-Za-z_]\w*'?", Name),
            (r"\d+(\.\d+)?([eE][+-]?\d+)?", Number),
            (r"->|\?\?|[-+*/%=<>!&|]+", Operator),
            (r"[\s\S]", Text),
        ]
    }
