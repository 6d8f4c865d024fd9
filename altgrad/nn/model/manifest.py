"""What `quantize_model` did: which layers it swapped, which it skipped and why, and which products it cannot see."""

from __future__ import annotations

from dataclasses import dataclass, field

from altgrad.nn.recipe.spec import LayerRecipe


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
class Manifest:
    """The outcome of `quantize_model`.

    swapped: by module name. skipped: module name to reason. unseen: matrix products that stay unquantized because they
    are function calls (attention, einsum, ...). With an example input they are traced and the list is exact for that
    input; without one they are read from the source of the classes' forward methods: calls made further down (in
    functions that forward calls) are not found, and branches not taken are. uncalled: swapped layers that the example
    did not call; a model that reads such a layer's weight directly gets the unquantized weight.
    """

    swapped: dict[str, Swapped] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unseen: tuple[UnseenProduct, ...] = ()
    uncalled: tuple[str, ...] = ()
    traced: bool = False

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}:"]
        lines += [f"  {name or '(root)'} ({one.type})  {one.shown}" for name, one in self.swapped.items()]
        lines.append(f"skipped {len(self.skipped)}:")
        lines += [f"  {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        how = "traced with the example" if self.traced else "read from the classes' source; pass example= to trace"
        lines.append(f"matrix products not seen by any layer, {how}: {len(self.unseen)}")
        lines += [f"  {product}" for product in self.unseen]
        if self.uncalled:
            lines.append(f"swapped, but not called by the example: {', '.join(self.uncalled)}")
        return "\n".join(lines)
