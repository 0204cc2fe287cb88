"""The asserts of a cell, rewritten so that their comparisons go through a recorder (as pytest does to tests)."""

import ast
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from claim_comparisons import ASSERT_CLOSE

RECORDER = "__claims__"
CERTAIN = (
    "always:"  # begins the message of an assert that cannot fail by luck: `assert a <= b, "always: Cauchy–Schwarz"`
)
SIGNS: dict[type[ast.cmpop], str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "=="}
CLOSE = {"allclose", "isclose"}
LIBRARIES = {"np", "numpy", "torch"}


def claims_in(source: str) -> set[str]:
    """What the asserts of a cell say, in the words in which they are recorded.

    Without those under a condition, which need not run everywhere: where no language model is installed, say.
    """
    said: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Assert):
            said.add(ast.unparse(node.test))
        elif isinstance(node, ast.Expr) and _is_assertion(node.value):
            said.add(ast.unparse(node.value))
    return said


class Rewriter(ast.NodeTransformer):
    """Sends the comparisons of every assert through the recorder.

    Only what decides the assert is rewritten: not the condition of a comprehension, not an index, not an operand.
    """

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        """`assert finish(start(…), test), explain(message)`."""
        said = ast.literal_eval(node.msg) if isinstance(node.msg, ast.Constant) else ""
        certain = ast.Constant(str(said).startswith(CERTAIN))
        start = self._call("start", ast.Constant(node.lineno), ast.Constant(ast.unparse(node.test)), certain)
        test = self._call("finish", start, self._claimed(node.test, negated=False, one_suffices=False))
        message = self._call("explain", *([node.msg] if node.msg else []))
        return self._placed(ast.Assert(test, message), node)

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        """`np.testing.assert_allclose(…)` and `torch.testing.assert_close(…)` as statements."""
        call = node.value
        if not _is_assertion(call):
            return node
        said = ast.Constant(node.lineno), ast.Constant(ast.unparse(call))
        claim = self._call("assert_close", *said, call.func, *call.args, keywords=call.keywords)
        return self._placed(ast.Expr(claim), node)

    def _claimed(self, node: ast.expr, negated: bool, one_suffices: bool) -> ast.expr:
        """The expression with its deciding comparisons rewritten."""
        match node:
            case ast.Compare(ops=ops) if all(type(op) in SIGNS for op in ops):
                operands = [node.left, *node.comparators]
                signs = _constants([SIGNS[type(op)] for op in ops])
                # In `worst < 5 < 20 < best` the middle only says how wide the gap is.
                measured = _constants([not _literal(a) or not _literal(b) for a, b in pairwise(operands)])
                flags = measured, ast.Constant(negated), ast.Constant(one_suffices)
                said = ast.Constant(ast.unparse(node))
                return self._placed(self._call("compare", said, signs, *flags, *operands), node)
            case ast.UnaryOp(op=ast.Not() | ast.Invert()):
                node.operand = self._claimed(node.operand, not negated, one_suffices)
            case ast.BoolOp(op=op):
                some = one_suffices or isinstance(op, ast.Or) != negated
                node.values = [self._claimed(value, negated, some) for value in node.values]
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr() as op):
                some = one_suffices or isinstance(op, ast.BitOr) != negated
                node.left, node.right = (self._claimed(side, negated, some) for side in (node.left, node.right))
            case ast.IfExp():
                node.body = self._claimed(node.body, negated, one_suffices)
                node.orelse = self._claimed(node.orelse, negated, one_suffices)
            case ast.GeneratorExp() | ast.ListComp():
                node.elt = self._claimed(node.elt, negated, one_suffices)
            case ast.Call(func=func) if _name(func) in CLOSE and not negated:
                call = self._call("close", ast.Constant(ast.unparse(node)), func, *node.args, keywords=node.keywords)
                return self._placed(call, node)
            case ast.Call(func=func) if _name(func) in ("all", "any"):
                some = one_suffices or ((_name(func) == "any") != negated)
                if isinstance(func, ast.Attribute) and getattr(func.value, "id", "") not in LIBRARIES:
                    func.value = self._claimed(func.value, negated, some)  # (a < b).all()
                elif node.args:
                    node.args[0] = self._claimed(node.args[0], negated, some)  # all(…), np.all(…)
        return node

    @staticmethod
    def _call(method: str, *args: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
        """`__claims__.method(…)`."""
        return ast.Call(ast.Attribute(ast.Name(RECORDER, ast.Load()), method, ast.Load()), list(args), keywords or [])

    @staticmethod
    def _placed(new: Any, old: ast.AST) -> Any:
        """The new node where the old one was, so that tracebacks show the author's line."""
        return ast.fix_missing_locations(ast.copy_location(new, old))


def _is_assertion(node: ast.expr) -> TypeGuard[ast.Call]:
    """Is it a call of a function that compares and raises?"""
    return isinstance(node, ast.Call) and _name(node.func) in ASSERT_CLOSE


def _name(function: ast.expr) -> str:
    """`close` of `close(…)` and of `torch.testing.close(…)`."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _literal(node: ast.expr) -> bool:
    """A number written out, perhaps with a sign."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _constants(values: Sequence[str | bool]) -> ast.Tuple:
    """A tuple written out."""
    return ast.Tuple([ast.Constant(value) for value in values], ast.Load())
