"""What is learned in a tuning: data, noise, network, and how long a run may be."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Task:
    """A task; with a method, a configuration and a seed it decides a run.

    Attributes:
      name: What the command line calls it.
      dataset: As `data.load` knows it.
      train_images: Training images, those for validation included.
      steps: Fewest and most steps of a run.
      pool: Pixels at each side that are averaged into one.
      model: Name of the network.
      noise: Share of the training labels that are drawn anew.
      batch_size: Images in a batch.
    """

    name: str
    dataset: str
    train_images: int
    steps: tuple[int, int] = (50, 400)
    pool: int = 1
    model: str = "smallcnn"
    noise: float = 0.0
    batch_size: int = 100

    @property
    def label(self) -> str:
        """Name of this task with its noise and its batch, as of a folder."""
        return f"{self.name}-noise{self.noise * 100:g}-batch{self.batch_size}"


TASKS: Mapping[str, Task] = {
    "digits": Task("digits", "digits", 1_000),
    "fashion-1000": Task("fashion-1000", "fashion_mnist", 1_000, pool=2),
    "fashion": Task("fashion", "fashion_mnist", 60_000, (400, 3_200), pool=2),
}
TITLES: Mapping[str, str] = {
    "digits": "Digits",
    "fashion-1000": "Fashion-MNIST, 1,000 images of 14 x 14",
    "fashion": "Fashion-MNIST, 60,000 images of 14 x 14",
}


def title(task: Mapping[str, object]) -> str:
    """Return the title of a task, given as the rows have it."""
    name, noise = str(task["name"]), task["noise"]
    batch = f"batch {task['batch_size']}"
    noisy = f"{noise:.0%} noise" if noise else "no noise"
    return f"{TITLES.get(name, name)}, {noisy}, {batch}"
