class Queue:
    """A first-in, first-out queue of café orders."""

    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        if item is None:
            raise ValueError("None can't be queued")
        self.items.append(item)
        return len(self.items)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty queue")
        return self.items.pop(0)


def main():
    queue = Queue(["espresso", "flat white"])
    for number, order in enumerate(queue.items, 1):
        print(f"{number}: {order}")


if __name__ == "__main__":
    main()
