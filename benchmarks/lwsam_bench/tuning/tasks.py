"""What is learned in a tuning: data, noise, network, and how long a run may be."""

import dataclasses
from collections.abc import Mapping

from lwsam_bench.support.errors import UserError


TEXT = "tiny_shakespeare"  # the dataset that is no images


@dataclasses.dataclass(frozen=True)
class Task:
    """A task; with a method, a configuration and a seed it decides a run.

    Attributes:
      name: What the command line calls it.
      dataset: As `data.load` knows it.
      train_images: Training images, or characters, those for validation included.
      steps: Fewest and most steps of a run.
      pool: Pixels at each side that are averaged into one.
      model: Name of the network.
      noise: Share of the training labels that are drawn anew.
      batch_size: Images, or excerpts of a text, in a batch.
      turns: In how many turns the classes are learned, each its share of them.
      test_images: Test images or characters; None takes all.
    """

    name: str
    dataset: str
    train_images: int
    steps: tuple[int, int] = (50, 400)
    pool: int = 1
    model: str = "smallcnn"
    noise: float = 0.0
    batch_size: int = 100
    turns: int = 1
    test_images: int | None = None

    def __post_init__(self):
        """Refuse noise where there are no labels.

        Raises:
          UserError: If there is.
        """
        if self.noise and self.is_text:
            raise UserError(
                f"--noise {self.noise:g}: {self.name} has no labels to draw anew; leave"
                " it out"
            )

    @property
    def is_text(self) -> bool:
        """Whether the next character is learned, not the class of an image."""
        return self.dataset == TEXT

    @property
    def label(self) -> str:
        """Name of this task with its noise and its batch, as of a folder."""
        return f"{self.name}-noise{self.noise * 100:g}-batch{self.batch_size}"


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("digits", "digits", 1_000),
        Task("fashion-1000", "fashion_mnist", 1_000, pool=2),
        Task("fashion", "fashion_mnist", 60_000, (400, 3_200), pool=2),
        Task("forgetting-digits", "digits", 1_000, turns=2),
        Task("forgetting-fashion", "fashion_mnist", 1_000, pool=2, turns=2),
        Task("cifar-2000", "cifar10", 2_000, pool=2, test_images=2_000),
        Task(
            "shakespeare",
            TEXT,
            4_000,
            model="gpt-small",
            test_images=10_000,
        ),
    )
}
TITLES: Mapping[str, str] = {
    "digits": "Digits",
    "fashion-1000": "Fashion-MNIST, 1,000 images of 14 x 14",
    "fashion": "Fashion-MNIST, 60,000 images of 14 x 14",
    "forgetting-digits": "Forgetting: digits 0 to 4, then 5 to 9",
    "forgetting-fashion": "Forgetting: five classes of Fashion-MNIST, then the others",
    "cifar-2000": "CIFAR-10, 2,000 images of 16 x 16",
    "shakespeare": "Tiny Shakespeare, 4,000 characters",
}


def title(task: Mapping[str, object]) -> str:
    """Return the title of a task, given as the rows have it."""
    name, noise = str(task["name"]), task["noise"]
    batch = f"batch {task['batch_size']}"
    noisy = f"{noise:.0%} noise, " if noise else "no noise, "
    if task["dataset"] == TEXT:
        noisy = ""
    return f"{TITLES.get(name, name)}, {noisy}{batch}"
