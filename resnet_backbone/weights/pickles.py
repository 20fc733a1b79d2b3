"""Pickles read as data: no name in them is ever imported, no object of theirs is ever called.

Python's own unpickler runs whatever a file names. ``torch.load(weights_only=True)`` does not, but
it admits more than weights need: before torch 2.6 it could be made to run code (CVE-2025-32434),
and it unpacks compressed archives, 40 kB to 40 MB. So the standard library's ``pickletools``
splits the stream into operations here, and the few of them that containers, numbers, texts and
arrays need are carried out; the rest is refused by name.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from resnet_backbone.weights.numpy_records import ArrayRecord, DtypeRecord, Refused, set_item

# A file can ask for 64 bytes of memory with each of its bytes: a bound on operations bounds that to
# about 100 MB. A ResNet-152 with Adam's state takes 66,000, the CIFAR ResNet-1202 510,000.
MAX_OPERATIONS = 1_000_000
# Operations that push their argument, or one constant.
_ARGUMENTS = frozenset(
    "INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What files of well-known trainings hold beside the weights -> how to get the weights alone.
REMEDIES = {
    ("argparse", "Namespace"): ": where you trust the file, save its weights alone with "
    "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')",
}
_MARK = object()


class Machine:
    """Carries out the operations of one pickle; see the module's docstring.

    Args:
        names: (module, name) -> what stands in for it, a function of this package or a constant;
            everything else is refused.
        persistent: turns a persistent id into a value; None: such ids are refused.
    """

    def __init__(
        self,
        names: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.names, self.persistent = names, persistent
        self.callables = [value for value in names.values() if callable(value)]
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.operations = 0

    def run(self, stream: io.BytesIO) -> Any:
        """Reads one pickle and leaves the stream behind it.

        Raises:
            ValueError: damaged, or holding what data do not need.
            IndexError, KeyError, TypeError: damaged.
        """
        for operation, argument, _ in pickletools.genops(stream):
            self._count(1)
            self._step(operation.name, argument)
        return self._pop(1)[0]

    def _count(self, operations: int) -> None:
        self.operations += operations
        if self.operations > MAX_OPERATIONS:
            raise Refused(f"more than {MAX_OPERATIONS} operations")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            operation = getattr(self, f"_do_{name.lower()}", None)
            if operation is None:
                raise Refused(f"the operation {name}, which data do not need")
            operation(argument)

    def _pop(self, count: int) -> list:
        values = self.stack[-count:]
        if len(values) != count or any(value is _MARK for value in values):
            raise IndexError("the pickle's stack is empty")
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise IndexError("the pickle has no mark")

    def _do_mark(self, _) -> None:
        self.stack.append(_MARK)

    def _do_tuple(self, _) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _do_empty_list(self, _) -> None:
        self.stack.append([])

    def _do_list(self, _) -> None:
        self.stack.append(self._pop_to_mark())

    def _do_append(self, _) -> None:
        self._extend(self._pop(1))

    def _do_appends(self, _) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("something that is appended to what is not a list")
        self.stack[-1].extend(values)

    def _do_empty_dict(self, _) -> None:
        self.stack.append({})

    def _do_dict(self, _) -> None:
        values = self._pop_to_mark()
        self.stack.append({})
        self._set_items(values)

    def _do_setitem(self, _) -> None:
        self._set_items(self._pop(2))

    def _do_setitems(self, _) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, values: list) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            set_item(self.stack[-1], key, value)

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def _do_stack_global(self, _) -> None:
        self._push_name(*self._pop(2))

    def _push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name that is not text")
        if (module, name) not in self.names:
            mend = REMEDIES.get((module, name), "")
            raise Refused(f"{module[:80]}.{name[:80]}, which is code and not data{mend}")
        self.stack.append(self.names[module, name])

    def _do_reduce(self, _) -> None:
        function, arguments = self._pop(2)
        if not any(function is known for known in self.callables):
            raise Refused("a call of something that is no function")
        if not isinstance(arguments, tuple):
            raise Refused("a call whose arguments are not a tuple")
        self._count(sum(len(each) for each in arguments if isinstance(each, (dict, list, tuple))))
        self.stack.append(function(*arguments))

    def _do_build(self, _) -> None:
        (state,) = self._pop(1)
        target = self.stack[-1]
        if isinstance(target, (ArrayRecord, DtypeRecord)):
            target.build(state)
        elif type(target) is not dict:  # an OrderedDict's attributes: torch's _metadata
            raise Refused(f"a state for a {type(target).__name__}")

    def _do_binpersid(self, _) -> None:
        if self.persistent is None:
            raise Refused("a reference to something outside of the file")
        (identity,) = self._pop(1)
        self.stack.append(self.persistent(identity))
