"""Tests written as Python asserts, rewritten so that each assert is counted and `True` is not 1. The text is the data set's own.

The text is parsed and rewritten here and never run here: the result goes to the tests' jail (`code_jail`), where a bookkeeper notes which
asserts were reached, held and failed.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass
from functools import lru_cache

BOOKKEEPER = "vlpost_asserts"
"""Name of the bookkeeper in the rewritten tests; tests that use it themselves are refused."""
MAX_ASSERTS_CHARS = 2**20
"""Longest text of asserts, characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewrittenAsserts:
    """Tests as they run in their jail."""

    text: str
    functions: tuple[str, ...]
    """Names that the tests use and neither define nor import: the candidate's functions."""
    sources: tuple[str, ...]
    """Each assert as it was written, for logs."""


class _Rewriter(ast.NodeTransformer):
    def __init__(self) -> None:
        self.sources: list[str] = []

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        index = len(self.sources)
        self.sources.append(ast.unparse(node))
        outcome = self.visit(node.test)
        guarded = ast.Try(
            body=[ast.Expr(_call("hold", [ast.Constant(index), outcome]))],
            handlers=[
                ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=[ast.Expr(_call("fail", [ast.Constant(index)]))])
            ],
            orelse=[],
            finalbody=[],
        )
        return ast.copy_location(guarded, node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        operands = [self.visit(operand) for operand in (node.left, *node.comparators)]
        operators = ast.Tuple([ast.Constant(_symbol(operator)) for operator in node.ops], ast.Load())
        return ast.copy_location(_call("compare", [operators, *operands]), node)


def _symbol(operator: ast.cmpop) -> str:
    """Returns the operator as it is written: `not in`."""
    return ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]


def _call(method: str, arguments: list[ast.expr]) -> ast.Call:
    return ast.Call(func=ast.Attribute(ast.Name(BOOKKEEPER, ast.Load()), method, ast.Load()), args=arguments, keywords=[])


@lru_cache(maxsize=256)
def rewrite_asserts(text: str) -> RewrittenAsserts:
    """Returns the tests as they run in their jail; a `ValueError` that says why when the text tests nothing of a candidate."""
    if len(text) > MAX_ASSERTS_CHARS:
        raise ValueError(f"asserts of {len(text)} characters; at most {MAX_ASSERTS_CHARS} are read")
    try:
        tree = ast.parse(text)
        functions = _free_names(tree)
        rewriter = _Rewriter()
        rewritten = ast.unparse(ast.fix_missing_locations(rewriter.visit(tree)))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the asserts cannot be read as Python ({type(error).__name__}: {error})") from error
    if not rewriter.sources:
        raise ValueError("the asserts hold no assert statement, so that anything would pass them")
    if not functions:
        raise ValueError("the asserts use no name that they do not define themselves: they would test nothing of the candidate")
    if BOOKKEEPER in functions:
        raise ValueError(f"the asserts use the name {BOOKKEEPER}, which is taken; rename it")
    return RewrittenAsserts(text=rewritten, functions=functions, sources=tuple(rewriter.sources))


def _free_names(tree: ast.AST) -> tuple[str, ...]:
    used: dict[str, None] = {}
    defined: set[str] = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                defined.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return tuple(name for name in used if name not in defined)
