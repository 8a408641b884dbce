"""The example of context parallelism on two processes, for test_train_examples.py."""

from launching import join, report

from deltanet.train.examples import long_context


def main():
    join()
    report({"losses": long_context.train("./model", "shards", "trained", length=96, steps=4, learning_rate=1e-2)})


if __name__ == "__main__":
    main()
