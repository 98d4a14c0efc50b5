// SPDX-License-Identifier: Apache-2.0
//
// What runs inside the pods of the tests, by its first argument. Each writes a line of JSON for what it saw.
//
//   serve PORT [RAW]          answers HTTP with {client, clientPort, server}: whom its socket has for a peer; on port RAW
//                             it says who connected, and closes
//   ask URL [SECONDS]         one request; prints that answer and {localPort}: if both ports are one, nobody was between
//   load URL MS               a request every MS milliseconds, each on a connection of its own, until SIGTERM
//   dns NAME=ADDRESS...       answers A queries
//   ztunnel-shared            the proxy of the shared contract, which prints each connection that it accepts
//   ztunnel-inpod SOCKET      that of the in-pod contract; it knows workloads from the API server

import { createSocket } from 'node:dgram';
import { createServer, get } from 'node:http';
import { createServer as listenRaw } from 'node:net';
import { hostname } from 'node:os';
import { loadNative } from '../../plugin/addon.ts';
import { Api } from '../../plugin/agent/kubernetes/api.ts';
import { TransparentProxy, unmapped } from '../../plugin/demo/proxy.ts';
import { type KnownWorkload, StandInZtunnel, ZTUNNEL_PORTS } from '../../plugin/demo/ztunnel.ts';

const ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';

export interface Answer {
  client: string;
  clientPort: number;
  server: string;
  /** of the one who asked */
  localPort: number;
}

function say(event: object): void {
  process.stdout.write(`${JSON.stringify(event)}\n`);
}

function serve(port: number, raw: number): void {
  const server = createServer((request, response) => {
    const { remoteAddress, remotePort: clientPort } = request.socket;
    const client = unmapped(remoteAddress);
    say({ at: Date.now(), url: request.url, client, clientPort });
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify({ client, clientPort, server: hostname() }));
  });
  server.listen(port, '::', () => say({ listening: port }));
  if (raw > 0) {
    listenRaw((socket) => {
      say({ at: Date.now(), connected: unmapped(socket.remoteAddress), clientPort: socket.remotePort });
      socket.on('error', () => {}).end();
    }).listen(raw, '::');
  }
  process.once('SIGTERM', () => process.exit(0));
}

function ask(url: string, seconds: number): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const sent = get(url, { agent: false, signal: AbortSignal.timeout(seconds * 1_000) }, (got) => {
      let text = '';
      const { localPort } = got.socket;
      got.setEncoding('utf8').on('data', (more: string) => {
        text += more;
      });
      got.once('error', reject).once('end', () => resolve({ ...JSON.parse(text), localPort }));
    });
    sent.once('error', reject);
  });
}

function load(url: string, period: number): void {
  let number = 0;
  let open = 0;
  const timer = setInterval(() => {
    const begun = Date.now();
    const mine = ++number;
    open++;
    ask(url, 10)
      .then(
        ({ server, clientPort, localPort }) =>
          say({ number: mine, begun, ms: Date.now() - begun, server, direct: clientPort === localPort }),
        (error: Error) => say({ number: mine, begun, ms: Date.now() - begun, error: String(error.cause ?? error) }),
      )
      .finally(() => open--);
  }, period);
  process.once('SIGTERM', async () => {
    clearInterval(timer);
    while (open > 0) await new Promise((resolve) => setTimeout(resolve, 20));
    say({ ended: number });
    process.exit(0);
  });
}

/** A answers to queries of one question; the rest is NXDOMAIN. */
function dns(names: ReadonlyMap<string, string>): void {
  const socket = createSocket('udp6');
  socket.on('message', (query, { address, port }) => {
    const labels: string[] = [];
    let at = 12;
    for (let length = query[at] ?? 0; length > 0; length = query[at] ?? 0) {
      labels.push(query.subarray(at + 1, at + 1 + length).toString('latin1'));
      at += length + 1;
    }
    const name = labels.join('.').toLowerCase();
    const type = query.readUInt16BE(at + 1);
    const found = names.get(name);
    say({ name, type, client: unmapped(address) });
    const head = Buffer.from(query.subarray(0, 12));
    const answers = found !== undefined && type === 1 ? 1 : 0;
    head.writeUInt16BE(found === undefined ? 0x8583 : 0x8580, 2);
    head.writeUInt16BE(answers, 6);
    head.writeUInt32BE(0, 8);
    const question = query.subarray(12, at + 5);
    const record = Buffer.from([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, ...(found ?? '').split('.').map(Number)]);
    socket.send(Buffer.concat(answers === 1 ? [head, question, record] : [head, question]), port, address);
  });
  socket.bind(53, '::', () => say({ listening: 53 }));
  process.once('SIGTERM', () => process.exit(0));
}

const onFailed = (error: Error) => say({ at: Date.now(), trouble: error.message });

/** A machine that is too busy is told from one that loses packets. */
function sayWhenLate(): void {
  const period = 100;
  let last = Date.now();
  setInterval(() => {
    const late = Date.now() - last - period;
    last = Date.now();
    if (late > 500) say({ at: last, trouble: `late by ${late} ms` });
  }, period);
}

async function ztunnelShared(): Promise<void> {
  const native = loadNative();
  const proxy = await TransparentProxy.start(native as never, {
    netns: native.openNetns('/proc/self/ns/net'),
    address: '::',
    ports: ZTUNNEL_PORTS,
    onSeen: (connection) => say({ at: Date.now(), ...connection }),
    onFailed,
  });
  say({ listening: true });
  sayWhenLate();
  process.once('SIGTERM', async () => {
    // As ztunnel drains: what is open may end.
    proxy.stopListening();
    const end = Date.now() + 5_000;
    while (proxy.connections > 0 && Date.now() < end) await new Promise((resolve) => setTimeout(resolve, 20));
    process.exit(0);
  });
}

async function ztunnelInPod(socket: string): Promise<void> {
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port } = process.env;
  const api = new Api({
    server: `https://${host}:${port}`,
    caFile: `${ACCOUNT}/ca.crt`,
    tokenFile: `${ACCOUNT}/token`,
  });
  let known: KnownWorkload[] = [];
  let said = '';
  const learn = async () => {
    const { items } = await api.list('/api/v1/pods');
    known = (items as unknown as ApiPod[]).map(({ metadata, spec, status }) => ({
      namespace: metadata.namespace,
      name: metadata.name,
      serviceAccount: spec.serviceAccountName ?? 'default',
      addresses: (status.podIPs ?? []).map(({ ip }) => ip),
    }));
    const addresses = known.flatMap((one) => one.addresses).sort();
    if (addresses.join() === said) return;
    said = addresses.join();
    ztunnel?.learned();
    say({ at: Date.now(), known: addresses });
  };
  let ztunnel: StandInZtunnel | undefined;
  await learn();
  // The next look when the last one has ended: on a busy machine they would pile up.
  const follow = () =>
    learn()
      .catch((error: unknown) => say({ failed: String(error) }))
      .finally(() => setTimeout(follow, 250));
  void follow();
  const started = StandInZtunnel.start(loadNative() as never, {
    socket,
    xds: () => known,
    onSeen: (uid, connection) => say({ at: Date.now(), uid, ...connection }),
    onFailed,
  });
  ztunnel = started;
  sayWhenLate();
  process.once('SIGTERM', () => void started.terminate());
  process.exit(await started.exited);
}

interface ApiPod {
  metadata: { namespace: string; name: string };
  spec: { serviceAccountName?: string };
  status: { podIPs?: { ip: string }[] };
}

const [role, ...args] = process.argv.slice(2);
if (role === 'serve') serve(Number(args[0]), Number(args[1] ?? 0));
else if (role === 'ask') {
  ask(args[0] ?? '', Number(args[1] ?? 5)).then(say, (error: Error) => {
    say({ error: String(error.cause ?? error) });
    process.exitCode = 1;
  });
} else if (role === 'load') load(args[0] ?? '', Number(args[1]));
else if (role === 'dns') dns(new Map(args.map((arg) => arg.split('=') as [string, string])));
else if (role === 'ztunnel-shared') await ztunnelShared();
else if (role === 'ztunnel-inpod') await ztunnelInPod(args[0] ?? '');
else throw new Error(`unknown role ${role}`);
