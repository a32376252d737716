"""The second route: PTX, as Numba makes it, translated to C++ instruction by instruction.

Every register becomes a variable and every instruction one statement; an instruction that is not in the tables below is
refused by name. All static shared arrays lie in one piece: an overrun from one into the next is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import build
from .launch import Kernel

FLAGS = ("-fwrapv", "-ffp-contract=off")
LONG = 150_000  # letters: beyond it g++ takes longer to optimise a kernel than tests take to run it

TYPES = {f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)}
TYPES |= {"f32": "float", "f64": "double", "pred": "bool"}
SPECIAL = {
    f"%{ours}.{axis}": f"runner::builtins.{theirs}.{axis}"
    for ours, theirs in (("tid", "thread"), ("ctaid", "block"), ("ntid", "block_size"), ("nctaid", "grid_size"))
    for axis in "xyz"
}

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
JOINS = {"and": "&&", "or": "||", "xor": "!="}

# One result from operands a, b, c of type T. Names are tried with their modifiers first.
RESULTS = {
    "mov": "{a}",
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul.wide": "wide({a}) * wide({b})",
    "mul.hi": "high_product({a}, {b})",
    "mul": "{a} * {b}",
    "mad.wide": "wide({a}) * wide({b}) + {c_wide}",
    "madc.hi": "high_product({a}, {b}) + {c} + carry",
    "mad.hi": "high_product({a}, {b}) + {c}",
    "mad": "{a} * {b} + {c}",
    "fma": "fma({a}, {b}, {c})",
    "neg": "-{a}",
    "abs": "({a} < 0 ? -{a} : {a})",
    "min": "least({a}, {b})",
    "max": "largest({a}, {b})",
    "and": "{a} & {b}",
    "or": "{a} | {b}",
    "xor": "{a} ^ {b}",
    "not": "~{a}",
    "shl": "shift_left({a}, {b32})",
    "shr": "shift_right({a}, {b32})",
    "selp": "({c_pred} ? {a} : {b})",
    "rcp": "1 / {a}",
    "sqrt": "sqrt({a})",
    "rsqrt": "1 / sqrt({a})",
    "ex2": "exp2({a})",
    "lg2": "log2({a})",
    "copysign": "copysign({b}, {a})",
    "prmt": "bytes_of({a}, {b}, {c})",
    "shf.l": "funnel({a}, {b}, {c}, true)",
    "shf.r": "funnel({a}, {b}, {c}, false)",
}
ROUNDINGS = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


FUNCTION = r"""
    \.(?P<kind>entry|func)\s*
    (?:\((?P<result>[^)]*)\)\s*)?
    (?P<name>[\w$]+)\s*
    \((?P<parameters>[^)]*)\)
    [^{;]*\{(?P<body>.*?)\n\}
"""
LIBRARY = {"__internal_trig_reduction_slowpathd"}  # functions that ptx.h has in C++: they compute with carry bits
VARIABLE = r"\.(shared|global|const)\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?(?:\s*=\s*\{([^}]*)\})?;"


class Translation:
    """One kernel and the functions it calls: their text in C++, and the bytes of static shared memory they need."""

    def __init__(self, ptx: str) -> None:
        self.text = with_short_names(re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL))
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.tables: dict[str, str] = {}
        self.locals: set[str] = set()
        self.kinds: dict[str, str] = {}  # of registers, as they are declared
        self.line = 0
        self.barriers = 0
        for found in re.findall(VARIABLE, self.text):
            self.declare(*found)

    def declare(self, space: str, align: str, kind: str, name: str, count: str, values: str) -> None:
        """A variable outside the functions: a shared array, or a table."""
        size = int(count or 1) * (int(kind[1:]) // 8)
        if space == "shared":
            self.shared[name] = -(-self.shared_bytes // int(align)) * int(align)
            self.shared_bytes = self.shared[name] + size
        else:
            self.tables[name] = f"RUNNER_CONSTANT {TYPES[kind]} {plain(name)}[{count or 1}] = {{{values}}};"

    def source(self) -> str:
        """All in C++, the kernel last."""
        found = [f for f in re.finditer(FUNCTION, self.text, re.DOTALL | re.VERBOSE) if f["name"] not in LIBRARY]
        functions = [self.function(f) for f in found if f["kind"] == "func"]
        functions += [self.kernel(f) for f in found if f["kind"] == "entry"]
        return "\n".join([*self.tables.values(), *functions, "RUNNER_EXPORT(kernel)", ""])

    def kernel(self, found: re.Match[str]) -> str:
        """The kernel; PTX reads its parameters as memory."""
        given = re.findall(r"\.param\s+\.(\w+)\s+([\w$]+)", found["parameters"])
        arguments = ", ".join(f"{TYPES[kind]} argument{i}" for i, (kind, _) in enumerate(given))
        places = [f"char* {plain(name)} = (char*)&argument{i};" for i, (_, name) in enumerate(given)]
        return "\n".join([f"static void kernel({arguments}) {{", *places, *self.body(found["body"]), "}"])

    def function(self, found: re.Match[str]) -> str:
        """A function; its parameters and its result are memory of the caller."""
        declared = f"{found['result'] or ''},{found['parameters']}"
        names = re.findall(r"\.\w+\s+([\w$]+)(?:\[\d+\])?\s*(?:,|$)", declared.strip())
        arguments = ", ".join(f"char* {plain(name)}" for name in names)
        return "\n".join([f"static void {plain(found['name'])}({arguments}) {{", *self.body(found["body"]), "}"])

    def body(self, text: str) -> list[str]:
        """Statements in C++."""
        return ["uint32_t carry = 0;"] + [line for statement in statements(text) for line in self.statement(statement)]

    def statement(self, text: str) -> list[str]:
        """One statement of PTX as lines of C++."""
        if text.startswith(".loc "):
            self.line = int(text.split()[2])
            return []
        if text.startswith(".reg"):
            return [self.registers(text)]
        if text.startswith(".local"):
            align, name, size = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text).groups()
            self.locals.add(name)
            return [f"alignas({align}) char {plain(name)}[{size}];"]
        if text in "{}":
            return [text]
        if text.endswith(":"):
            return [f"{plain(text[:-1])}: ;"]
        if text.startswith(".param"):
            name, size = re.search(r"\.b(?:8|16|32|64)\s+([\w$]+)(?:\[(\d+)\])?", text).groups()
            return [f"alignas(8) char {plain(name)}[{size or 8}];"]
        if text.startswith("."):
            return []
        return [self.instruction(text)]

    def registers(self, text: str) -> str:
        """Registers as variables; they begin as zero so that goto may pass them."""
        kind, name, count = re.match(r"\.reg\s+\.(\w+)\s+(%?\w+?)(?:<(\d+)>)?$", text).groups()
        names = [f"{name}{i}" for i in range(int(count))] if count else [name]
        self.kinds |= dict.fromkeys(names, kind)
        return f"{TYPES[kind]} " + ", ".join(f"{plain(each)} = 0" for each in names) + ";" if names else ""

    def instruction(self, text: str) -> str:
        """One instruction, perhaps under a predicate."""
        found = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, flags=re.DOTALL)
        negated, predicate, name, rest = found.groups()
        operands = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", rest)] if rest else []
        condition = f"if ({negated}{plain(predicate)}) " if predicate else ""
        return f"{condition}{{ {self.meaning(name.split('.'), operands)} }}"

    def meaning(self, name: list[str], operands: list[str]) -> str:
        """The C++ of one instruction."""
        special = getattr(self, f"do_{name[0]}", None)
        if special:
            return special(name, operands)
        if name[:3] == ["mad", "lo", "cc"]:
            a, b, c = (self.read(x, "u32") for x in operands[1:])
            sum_ = f"uint64_t(uint32_t({a} * {b})) + {c}"
            return f"uint64_t sum = {sum_}; {self.put(operands[0], 'u32', 'sum')} carry = sum >> 32;"
        if "sat" in name and name[0] != "cvt":
            raise NotImplementedError(f"the runner has no limits of PTX instruction {'.'.join(name)}")
        if "cc" in name:
            raise NotImplementedError(f"the runner has no carry of PTX instruction {'.'.join(name)}")
        for form in (".".join(name[:2]), name[0]):
            if form in RESULTS:
                return self.result(RESULTS[form], name[-1], operands)
        raise NotImplementedError(f"the runner has no PTX instruction {'.'.join(name)}")

    def result(self, form: str, kind: str, operands: list[str]) -> str:
        """``d = form(a, b, c)``; numbers wrap, as the compiler is told."""
        values = {letter: self.read(x, kind) for letter, x in zip("abc", operands[1:], strict=False)}
        if len(operands) > 2:
            values["b32"] = self.read(operands[2], "u32")
        if len(operands) > 3:
            values["c_pred"] = self.read(operands[3], "pred")
            values["c_wide"] = self.read(operands[3], wider(kind) if kind[1:] in "1632" else kind)
        form = form.replace("~{a}", "!{a}") if kind == "pred" else form
        if kind == "f32":
            form = re.sub(r"\b(fma|sqrt|exp2|log2|copysign)\(", r"\1f(", form)
        if form.startswith("wide("):
            kind = wider(kind)
        return self.put(operands[0], kind, f"({TYPES[kind]})({form.format(**values)})")

    def seen_as(self, register: str, kind: str) -> str:
        """A register as a variable of another type with as many bits, without a word for g++ to look up."""
        return plain(register) if TYPES[self.kinds[register]] == TYPES[kind] else f"({TYPES[kind]}&){plain(register)}"

    def converts(self, register: str, kind: str) -> bool:
        """Whether C++ itself makes a number of this type of the register's, and the other way round."""
        return whole_number(self.kinds[register]) and whole_number(kind)

    def put(self, register: str, kind: str, value: str) -> str:
        """A value of one type into a register."""
        if self.converts(register, kind):
            return f"{plain(register)} = ({TYPES[kind]})({value});"
        if bits(self.kinds[register]) == bits(kind):
            return f"{self.seen_as(register, kind)} = {value};"
        return f"set({plain(register)}, {value});"

    def get(self, register: str, kind: str) -> str:
        """A register as a value of one type."""
        if TYPES[self.kinds[register]] == TYPES[kind]:
            return plain(register)
        if self.converts(register, kind):
            return f"({TYPES[kind]}){plain(register)}"
        if bits(self.kinds[register]) == bits(kind):
            return self.seen_as(register, kind)
        return f"as<{TYPES[kind]}>({plain(register)})"

    def read(self, operand: str, kind: str) -> str:
        """An operand as a value of one type."""
        type_ = TYPES[kind]
        if operand in SPECIAL:
            return f"as<{type_}>({SPECIAL[operand]})"
        if operand.startswith("!"):
            return f"!{plain(operand[1:])}"
        if operand.startswith("%"):
            return self.get(operand, kind)
        if re.match(r"0[fFdD][0-9a-fA-F]+$", operand):
            return f"as<{type_}>(0x{operand[2:]}ull)"
        if operand in self.shared:
            return f"({type_}){self.shared[operand]}"
        if operand in self.locals or operand in self.tables:
            return f"({type_})(uint64_t){plain(operand)}"
        if re.match(r"-?(0x)?[0-9a-fA-F]+U?$", operand):
            return f"({type_}){operand.rstrip('U')}{'ull' if operand.startswith('0x') else 'll'}"
        raise NotImplementedError(f"the runner cannot read the PTX operand {operand!r}")

    def address(self, operand: str, space: str) -> str:
        """``[base + offset]`` as a number."""
        base, offset = re.match(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+))?\s*\]$", operand).groups()
        start = "shared_memory() + " if space == "shared" else ""
        return f"{start}{self.read(base, 'u64')} + {offset or 0}"

    def parameter(self, operand: str) -> str:
        """``[parameter + offset]`` as a pointer."""
        name, offset = re.match(r"\[([\w$]+)(?:\+(\d+))?\]$", operand).groups()
        return f"{plain(name)} + {offset or 0}"

    def do_ld(self, name: list[str], operands: list[str]) -> str:
        """Load of one number or of a short vector."""
        kind, space = name[-1], next((x for x in name if x in ("param", "shared", "global", "local", "const")), "")
        if space == "param":
            return self.put(operands[0], kind, f"*({TYPES[kind]}*)({self.parameter(operands[1])})")
        size, at = int(kind[1:]) // 8, self.address(operands[1], space)
        into = [part.strip() for part in operands[0].strip("{}").split(",")]
        return " ".join(
            self.put(x, kind, f"load<{TYPES[kind]}>({at} + {i * size}, {self.line})") for i, x in enumerate(into)
        )

    do_ldu = do_ld

    def do_st(self, name: list[str], operands: list[str]) -> str:
        """Store of one number or of a short vector."""
        kind, space = name[-1], next((x for x in name if x in ("shared", "global", "local")), "")
        if "param" in name:
            return f"*({TYPES[kind]}*)({self.parameter(operands[0])}) = {self.read(operands[1], kind)};"
        size, at = int(kind[1:]) // 8, self.address(operands[0], space)
        values = [self.read(part.strip(), kind) for part in operands[1].strip("{}").split(",")]
        return " ".join(f"store<{TYPES[kind]}>({at} + {i * size}, {x}, {self.line});" for i, x in enumerate(values))

    def do_mov(self, name: list[str], operands: list[str]) -> str:
        """Copy; braces pack or unpack halves of a wider register."""
        kind = name[-1]
        if "{" not in "".join(operands):
            return self.result("{a}", kind, operands)
        half = f"u{int(kind[1:]) // 2}"
        if operands[0].startswith("{"):
            low, high = (part.strip() for part in operands[0].strip("{}").split(","))
            both, type_ = self.read(operands[1], f"u{kind[1:]}"), TYPES[half]
            parts = self.put(low, half, f"({type_})x"), self.put(high, half, f"({type_})(x >> {half[1:]})")
            return f"auto x = {both}; {' '.join(parts)}"
        low, high = (self.read(part.strip(), half) for part in operands[1].strip("{}").split(","))
        wide = TYPES[f"u{kind[1:]}"]
        return self.put(operands[0], f"u{kind[1:]}", f"({wide})(({wide}){high} << {half[1:]} | {low})")

    def do_cvta(self, name: list[str], operands: list[str]) -> str:
        """Between addresses in one space and addresses in all memory."""
        shift = " + shared_memory()" if "shared" in name else ""
        sign = shift.replace("+", "-") if "to" in name else shift
        return self.put(operands[0], "u64", f"{self.read(operands[1], 'u64')}{sign}")

    def do_cvt(self, name: list[str], operands: list[str]) -> str:
        """Between types of numbers."""
        to, from_ = name[-2:]
        x = self.read(operands[1], from_)
        rounding = next((ROUNDINGS[part] for part in name if part in ROUNDINGS), None)
        if from_[0] == "f" and rounding:
            x = f"({TYPES[from_]}){rounding}({x})"
        if from_[0] == "f" and to[0] != "f":
            x = f"whole<{TYPES[to]}>({x})"
        if "sat" in name:
            x = f"saturated({x})"
        return self.put(operands[0], to, f"({TYPES[to]})({x})")

    def do_setp(self, name: list[str], operands: list[str]) -> str:
        """A comparison, perhaps joined with another predicate; those that end in u are true of NaN."""
        kind, compare = name[-1], name[1]
        x, y = (self.read(operand, kind) for operand in operands[1:3])
        real = kind[0] == "f"
        if compare in ("nan", "num"):
            test = f"{'!' if compare == 'num' else ''}({x} != {x} || {y} != {y})"
        elif real and compare.endswith("u"):
            test = f"({x} != {x} || {y} != {y} || {x} {COMPARISONS[compare[:-1]]} {y})"
        elif real and compare == "ne":
            test = f"({x} < {y} || {x} > {y})"
        else:
            test = f"({x} {COMPARISONS[compare]} {y})"
        if name[2] in JOINS:
            test = f"({test} {JOINS[name[2]]} {self.read(operands[3], 'pred')})"
        return self.put(operands[0], "pred", test)

    def do_bfi(self, name: list[str], operands: list[str]) -> str:
        """Some bits of a put into b."""
        kind = name[-1]
        a, b = (self.read(x, kind) for x in operands[1:3])
        at, count = (self.read(x, "u32") for x in operands[3:5])
        return self.put(operands[0], kind, f"with_bits({a}, {b}, {at}, {count})")

    def do_div(self, name: list[str], operands: list[str]) -> str:
        """Quotient; of integers only by what is not zero."""
        return self.quotient("/", name[-1], operands)

    def do_rem(self, name: list[str], operands: list[str]) -> str:
        """Remainder."""
        return self.quotient("%", name[-1], operands)

    def quotient(self, sign: str, kind: str, operands: list[str]) -> str:
        """a / b or a % b."""
        b = self.read(operands[2], kind)
        b = b if kind[0] == "f" else f"divisor({b}, {self.line})"
        return self.put(operands[0], kind, f"({TYPES[kind]})({self.read(operands[1], kind)} {sign} {b})")

    def do_bra(self, name: list[str], operands: list[str]) -> str:
        """Jump."""
        return f"goto {plain(operands[0])};"

    def do_call(self, name: list[str], operands: list[str]) -> str:
        """Call; what is handed over is memory."""
        names = [plain(part) for part in re.findall(r"[\w$]+", " ".join(operands))]
        place = next(i for i, part in enumerate(operands) if not part.startswith("("))
        return f"{names.pop(place)}({', '.join(names)});"

    def do_ret(self, name: list[str], operands: list[str]) -> str:
        """End of the thread."""
        return "return;"

    def do_bar(self, name: list[str], operands: list[str]) -> str:
        """Barrier of the block."""
        if name != ["bar", "sync"] or operands != ["0"]:
            raise NotImplementedError(f"the runner has no barrier {'.'.join(name)} {operands}")
        self.barriers += 1
        return f"if (runner::keeps({self.barriers - 1})) runner::block_barrier({self.line});"

    do_barrier = do_bar

    def do_shfl(self, name: list[str], operands: list[str]) -> str:
        """Shuffle by XOR of lanes."""
        if name[2] != "bfly":
            raise NotImplementedError(f"the runner has no shuffle {'.'.join(name)}")
        into = operands[0].split("|")[0].strip()
        value, distance, _, mask = (self.read(operand, "u32") for operand in operands[1:5])
        return self.put(into, "u32", f"shuffle({value}, {distance}, {mask}, {self.line})")


def with_short_names(text: str) -> str:
    """A text whose mangled names are numbers: Numba puts what it counts in a process into them."""
    names: dict[str, str] = {}
    return re.sub(r"\b_Z[\w$]+", lambda found: names.setdefault(found[0], f"name{len(names)}"), text)


def bits(kind: str) -> int:
    """Of a type."""
    return 8 if kind == "pred" else int(kind[1:])


def wider(kind: str) -> str:
    """The type of twice as many bits."""
    return f"{kind[0]}{2 * bits(kind)}"


def whole_number(kind: str) -> bool:
    """Whether C++ has the type among its integers."""
    return kind[0] != "f"


def plain(name: str) -> str:
    """A name of PTX as one of C++."""
    return "r_" + re.sub(r"\W", "_", name)


def statements(body: str) -> list[str]:
    """The statements of a body in order, the braces of inner scopes among them."""
    body = re.sub(r"^\s*(\.loc[^\n]*)$", r"\1;", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*([\w$]+:)", r"\1;", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*([{}])", r"\1;", body, flags=re.MULTILINE)
    return [part for part in (" ".join(part.split()) for part in body.split(";")) if part]


def ptx(text: str, flush: bool = False) -> Kernel:
    """Build the one kernel of a PTX text; every launch may look at all loads and stores."""
    translation = Translation(text)
    flags = ("-O1" if len(text) < LONG else "-O0", *FLAGS)
    return Kernel(build.library("ptx.h", translation.source(), flags), flush=flush, shared=translation.shared_bytes)


def flatten(arguments: Sequence[Any]) -> list[Any]:
    """Arguments as Numba hands them to a kernel: of an array its owner, its size, its memory, its shape and strides."""
    import numpy as np

    flat: list[Any] = []
    for x in arguments:
        if isinstance(x, np.ndarray):
            flat += [np.uint64(0), np.uint64(0), np.int64(x.size), np.int64(x.itemsize), x]
            flat += [np.int64(size) for size in x.shape] + [np.int64(stride) for stride in x.strides]
        else:
            flat.append(x)
    return flat
