"""What `quantize_model` did: which layers it swapped, which it skipped and why, and which products it cannot see."""

from __future__ import annotations

from dataclasses import dataclass, field

from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.report.notebook import notebook_table
from altgrad.report.numbers import plural


@dataclass(frozen=True)
class Swapped:
    """One swapped layer: its class before, its recipe, and the recipe as printed."""

    type: str
    recipe: LayerRecipe
    shown: str


@dataclass(frozen=True)
class UnseenProduct:
    """A matrix product that no quantized layer computes: in which module, by which call, and how it was found."""

    module: str
    call: str
    found_by: str  # "traced" (seen while the example ran) or "source" (read in the source of the module's class)

    def __str__(self) -> str:
        return f"{self.module or '(root)'}: {self.call} ({self.found_by})"


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    quantized: int
    of: int

    def __str__(self) -> str:
        return f"{self.quantized / self.of:.1%}" if self.of else "none"


@dataclass(frozen=True, repr=False)
class Manifest:
    """The outcome of `quantize_model`.

    swapped: by the layer's name (a raw parameter's: its module's and its own). skipped: name to reason. unseen: matrix
    products that stay unquantized because they are of no layer (attention, fused RNNs, operators of other libraries).
    With an example input they are traced by dispatch, and the list is exact for that input and `mode` ("training" or
    "evaluation", as the model was); without one they are read from the source of the classes' forward methods: calls made
    further down (in functions that forward calls) are not found, and branches not taken are. uncalled: swapped layers
    that the example did not call; a model that reads such a layer's weight directly gets the unquantized weight.
    parameters: how many of the model's are quantized. multiply_adds: the same of the traced run; None without one.
    uncounted: whether operators ran whose multiply-adds are not known. routes: which unit multiplies a layer's products
    where they are large (`altgrad.nn.layer.gemm.choose_route`; small ones take float32), for layers with products.
    idle: the recipe's overrides by a pattern that matches no module.
    """

    swapped: dict[str, Swapped] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unseen: tuple[UnseenProduct, ...] = ()
    uncalled: tuple[str, ...] = ()
    traced: bool = False
    mode: str = ""
    parameters: Share | None = None
    multiply_adds: Share | None = None
    uncounted: bool = False
    routes: dict[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Manifest({plural(len(self.swapped), 'layer')} quantized, {len(self.skipped)} skipped)"

    def _repr_html_(self) -> str:
        swapped = [(name or "(root)", one.type, one.shown) for name, one in self.swapped.items()]
        skipped = [(name or "(root)", "skipped", reason) for name, reason in self.skipped.items()]
        unseen = [(product.module or "(root)", "product unseen", product.call) for product in self.unseen]
        title = f"{plural(len(swapped), 'layer')} quantized" + (
            f", {self.parameters} of the parameters" if self.parameters else ""
        )
        return notebook_table(title, [*swapped, *skipped, *unseen], ("layer", "type", "formats, or why not"))

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}:"]
        lines += [f"  {name or '(root)'} ({one.type})  {one.shown}" for name, one in self.swapped.items()]
        lines.append(f"skipped {len(self.skipped)}:")
        lines += [f"  {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"override without a layer: {condition}" for condition in self.idle]
        for route in dict.fromkeys(self.routes.values()):
            names = [name or "(root)" for name, own in self.routes.items() if own == route]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"large products by {route}: {', '.join(names[:3])}{more}")
        if self.parameters is not None:
            of_products = "" if self.multiply_adds is None else f" and {self.multiply_adds} of the multiply-adds"
            unknown = " (operators of unknown size left out)" if self.uncounted else ""
            lines.append(f"quantized: {self.parameters} of the parameters{of_products}{unknown}")
        how = (
            f"traced with the example, in {self.mode}"
            if self.traced
            else "read from the classes' source; pass example= to trace"
        )
        lines.append(f"matrix products not seen by any layer, {how}: {len(self.unseen)}")
        lines += [f"  {product}" for product in self.unseen]
        if self.uncalled:
            lines.append(f"swapped, but not called by the example: {', '.join(self.uncalled)}")
        return "\n".join(lines)
