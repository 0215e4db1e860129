// Publishes events, reads them back as a member of a group, and asks Tamiyo for a decision.
//
//   npm ci && node main.js localhost:50051
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import { OonaStream, loadContract } from './oona.js';

const EVENTS = 3;

async function publishAndRead(target) {
  const run_id = `node-${randomUUID()}`;
  const stream = await OonaStream.open(target, `node-example-${randomUUID()}`);
  console.log(`open: confirmed means ${stream.opened.durability}`);

  const events = Array.from({ length: EVENTS }, (_, epoch) => ({
    event_id: randomUUID(), run_id, epoch_completed: { epoch, step: 100 * (epoch + 1) },
  }));
  const published = await stream.publish('KIND_EVENTS', events);
  console.log(`published: ${published.count} events from offset ${published.first_offset}`);

  await new Promise((resolve, reject) => {
    let left = EVENTS;
    const onRecords = async (records) => {
      try {
        for (const { event } of records) console.log(`delivered: epoch ${event.epoch_completed.epoch}`);
        const committed = await stream.ack(1, records);
        left -= records.length;
        // One record at a time, to show that nothing comes without credit. In life, grant many.
        if (left) stream.grant(1, 1);
        else resolve(console.log(`acknowledged: the group is done below offset ${committed}`));
      } catch (error) {
        reject(error);
      }
    };
    const fields = {
      subscription_id: 1, kind: 'KIND_EVENTS', group: `group of ${run_id}`, run_ids: [run_id],
      start: { offset: published.first_offset },
    };
    stream.subscribe(fields, onRecords).then(() => stream.grant(1, 1), reject);
  });
  await stream.unsubscribe(1);

  // A refusal fails its request and leaves the stream standing.
  const wrong = { event_id: randomUUID(), run_id, run_ended: {} };
  await stream.publish('KIND_TELEMETRY', [wrong]).catch((error) => console.log(`refused: ${error.message}`));
  stream.close();
}

async function decide(target) {
  const { Tamiyo } = loadContract();
  const tamiyo = new Tamiyo(target, grpc.credentials.createInsecure());
  const request = JSON.parse(readFileSync(new URL('../decide.json', import.meta.url)));
  const { decision, policy } = await promisify(tamiyo.Decide.bind(tamiyo))(request);
  console.log(`decided by ${policy}: ${decision.action.kind}`);
  tamiyo.close();
}

const target = process.argv[2] ?? 'localhost:50051';
await publishAndRead(target);
await decide(target);
