// One stream to Oona, spoken from the protos alone. The frame grammar stands above the RPC in oona.proto.
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const PROTOS = fileURLToPath(new URL('../../proto', import.meta.url));

/** The services of the contract. Fields keep their names; 64-bit numbers and enums are strings. */
export function loadContract() {
  const definition = loader.loadSync(
    ['esperml/v1/oona.proto', 'esperml/v1/tamiyo.proto'],
    { includeDirs: [PROTOS], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true },
  );
  return grpc.loadPackageDefinition(definition).esperml.v1;
}

/** A request that the server refused; the stream stands. */
export class RejectedError extends Error {
  constructor({ reason, message }) {
    super(`${reason}: ${message}`);
    this.reason = reason;
  }
}

/**
 * An open stream.
 *
 * It does what every client of Oona must: number requests and match answers to them, number events so that what is
 * published again is stored once, and grant credit. It does not reconnect: whoever needs that opens another stream under
 * the same client id, and publishes what was not confirmed with the same sequences.
 */
export class OonaStream {
  #call;
  #lastRequestId = 0;
  #answers = new Map(); // request id → what waits for its answer
  #subscriptions = new Map(); // subscription id → what takes its records
  #nextSequence;
  #ended = null;

  /** Opens a stream. `clientId` names this publisher for ever. */
  static async open(target, clientId, { credentials = grpc.credentials.createInsecure(), metadata = new grpc.Metadata() } = {}) {
    const stream = new OonaStream();
    const { Oona } = loadContract();
    stream.#call = new Oona(target, credentials).Stream(metadata);
    stream.#call.on('data', (response) => stream.#receive(response));
    stream.#call.on('error', (error) => stream.#end(error));
    stream.#call.on('end', () => stream.#end(new Error('the server ended the stream')));
    const { opened } = await stream.#request({ open: { client_id: clientId, client_version: 'esper-node-example' } });
    stream.#nextSequence = BigInt(opened.next_sequence);
    stream.opened = opened;
    return stream;
  }

  /** Stores events, all or none; resolves when they are stored and synced. */
  async publish(kind, events) {
    const first_sequence = this.#nextSequence;
    this.#nextSequence += BigInt(events.length);
    try {
      return (await this.#request({ publish: { kind, first_sequence: String(first_sequence), events } })).published;
    } catch (error) {
      // Nothing was stored: the next event takes this place. What was sent behind it meanwhile is refused as a gap.
      if (error instanceof RejectedError && first_sequence < this.#nextSequence) this.#nextSequence = first_sequence;
      throw error;
    }
  }

  /** Subscribes; `onRecords` gets each delivery's records. Nothing comes before credit is granted. */
  async subscribe(fields, onRecords) {
    this.#subscriptions.set(String(fields.subscription_id), onRecords);
    return (await this.#request({ subscribe: fields })).subscribed;
  }

  /** Allows so many records more. The server says nothing to it. */
  grant(subscription_id, messages) {
    this.#send({ grant: { subscription_id, messages } });
  }

  /** Says that records are done with; resolves with the offset below which the whole group is. */
  async ack(subscription_id, records) {
    const acked = records.map(({ offset }) => ({ first: offset, last: offset }));
    return (await this.#request({ ack: { subscription_id, acked } })).acked.committed_offset;
  }

  /** Ends a subscription; what was not acknowledged goes to another member of its group. */
  async unsubscribe(subscription_id) {
    await this.#request({ unsubscribe: { subscription_id } });
    this.#subscriptions.delete(String(subscription_id));
  }

  /** Ends the stream. */
  close() {
    this.#call.end();
  }

  #send(request) {
    const request_id = String(++this.#lastRequestId);
    this.#call.write({ request_id, ...request });
    return request_id;
  }

  #request(request) {
    return new Promise((resolve, reject) => {
      if (this.#ended) return reject(this.#ended);
      this.#answers.set(this.#send(request), { resolve, reject });
    });
  }

  #receive(response) {
    const waiting = this.#answers.get(response.request_id);
    if (waiting) {
      this.#answers.delete(response.request_id);
      if (response.rejected) waiting.reject(new RejectedError(response.rejected));
      else waiting.resolve(response);
    } else if (response.delivery) {
      this.#subscriptions.get(response.delivery.subscription_id)?.(response.delivery.records);
    }
  }

  #end(error) {
    this.#ended ??= error;
    for (const { reject } of this.#answers.values()) reject(this.#ended);
    this.#answers.clear();
  }
}
