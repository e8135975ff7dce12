"""A ClientApp as Flower's quickstart has it."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data, test, train

app = ClientApp()


@app.train()
def train_fn(message: Message, context: Context) -> Message:
    """Train the weights that were sent and return them."""
    config, partition = context.run_config, context.node_config["partition-id"]
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels, _, _ = load_data(partition, context.node_config["num-partitions"], config["classes"])
    seed = 1000 * config["seed"] + 100 * message.content["config"]["server-round"] + partition
    loss = train(net, images, labels, config["local-epochs"], config["learning-rate"], seed)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_fn(message: Message, context: Context) -> Message:
    """Test the weights that were sent."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    _, _, images, labels = load_data(partition, partitions, context.run_config["classes"])
    metrics = MetricRecord({"accuracy": test(net, images, labels), "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
