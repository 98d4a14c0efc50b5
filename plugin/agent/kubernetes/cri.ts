// SPDX-License-Identifier: Apache-2.0
// Sandboxes as the container runtime has them, over its CRI socket (runtime.v1): the two calls that tell where a running
// pod's network namespace is. gRPC is HTTP/2 with a five-byte header before each message, and Node speaks HTTP/2.

import { connect as connectHttp2, constants } from 'node:http2';
import { connect } from 'node:net';
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire';
import type { Sandbox, SandboxSource } from './sandboxes.ts';

const TIMEOUT_MS = 5_000;
/** A thousand pods are not a thousand lists. */
const LIST_MS = 1_000;
/** PodSandboxState */
const READY = 0;

interface ListedSandbox {
  id: string;
  uid: string;
  state: number;
  /** nanoseconds since 1970 */
  createdAt: bigint;
}

export class CriSandboxes implements SandboxSource {
  readonly #path: string;
  #listed: Promise<ListedSandbox[]> | undefined;
  #listedAt = Number.NEGATIVE_INFINITY;

  constructor(path: string) {
    this.#path = path;
  }

  async sandboxesOf(uids: readonly string[]): Promise<Sandbox[]> {
    if (this.#listed === undefined || performance.now() - this.#listedAt > LIST_MS) {
      this.#listedAt = performance.now();
      this.#listed = this.#call('ListPodSandbox', new Uint8Array()).then(decodeList);
      // Whoever waits for it hears of it; the next caller asks anew.
      this.#listed.catch(() => {
        this.#listed = undefined;
      });
    }
    const found = (await this.#listed)
      .filter(({ uid, state }) => state === READY && uids.includes(uid))
      .sort((a, b) => (a.createdAt < b.createdAt ? 1 : -1));
    const sandboxes = await Promise.all(found.map(({ id }) => this.#sandbox(id)));
    return sandboxes.filter((sandbox) => sandbox !== null);
  }

  async #sandbox(id: string): Promise<Sandbox | null> {
    // pod_sandbox_id = 1, verbose = 2
    const request = new BinaryWriter().tag(1, WireType.LengthDelimited).string(id).tag(2, WireType.Varint).bool(true);
    const netnsPath = netnsOf(decodeInfo(await this.#call('PodSandboxStatus', request.finish())));
    return netnsPath === null ? null : { containerId: id, netnsPath };
  }

  #call(method: string, message: Uint8Array): Promise<Uint8Array> {
    const what = `${this.#path}: ${method}`;
    return new Promise((resolve, reject) => {
      const session = connectHttp2('http://localhost', { createConnection: () => connect(this.#path) });
      const fail = (reason: string, cause?: unknown) => {
        clearTimeout(timer);
        session.destroy();
        reject(new Error(`${what}: ${reason}`, { cause }));
      };
      const timer = setTimeout(() => fail(`no answer within ${TIMEOUT_MS} ms`), TIMEOUT_MS);
      session.on('error', (error) => fail(error.message, error));
      const stream = session.request({
        [constants.HTTP2_HEADER_METHOD]: 'POST',
        [constants.HTTP2_HEADER_PATH]: `/runtime.v1.RuntimeService/${method}`,
        [constants.HTTP2_HEADER_CONTENT_TYPE]: 'application/grpc',
        [constants.HTTP2_HEADER_TE]: 'trailers',
      });
      const chunks: Buffer[] = [];
      let status: unknown;
      let words: unknown;
      const take = (headers: Record<string, unknown>) => {
        status = headers['grpc-status'] ?? status;
        words = headers['grpc-message'] ?? words;
      };
      stream.on('response', take);
      stream.on('trailers', take);
      stream.on('data', (chunk: Buffer) => chunks.push(chunk));
      stream.on('error', (error) => fail(error.message, error));
      stream.on('end', () => {
        if (status !== '0') {
          fail(`gRPC status ${status}${words === undefined ? '' : `: ${words}`}`);
          return;
        }
        clearTimeout(timer);
        session.close();
        resolve(new Uint8Array(Buffer.concat(chunks).subarray(5)));
      });
      const header = Buffer.alloc(5);
      header.writeUInt32BE(message.length, 1);
      stream.end(Buffer.concat([header, message]));
    });
  }
}

/** ListPodSandboxResponse: items = 1 */
function decodeList(bytes: Uint8Array): ListedSandbox[] {
  const items: ListedSandbox[] = [];
  fields(bytes, (field, wire, reader) => {
    if (field === 1) items.push(decodeSandbox(reader.bytes()));
    else reader.skip(wire);
  });
  return items;
}

/** PodSandbox: id = 1, metadata = 2 (uid = 2), state = 3, created_at = 4 */
function decodeSandbox(bytes: Uint8Array): ListedSandbox {
  const sandbox: ListedSandbox = { id: '', uid: '', state: READY, createdAt: 0n };
  fields(bytes, (field, wire, reader) => {
    if (field === 1) sandbox.id = reader.string();
    else if (field === 2) {
      fields(reader.bytes(), (inner, innerWire, metadata) => {
        if (inner === 2) sandbox.uid = metadata.string();
        else metadata.skip(innerWire);
      });
    } else if (field === 3) sandbox.state = reader.int32();
    else if (field === 4) sandbox.createdAt = BigInt(reader.int64());
    else reader.skip(wire);
  });
  return sandbox;
}

/** PodSandboxStatusResponse: info = 2, a map of strings; containerd and CRI-O put a JSON document under "info". */
function decodeInfo(bytes: Uint8Array): string {
  let document = '{}';
  fields(bytes, (field, wire, reader) => {
    if (field !== 2) {
      reader.skip(wire);
      return;
    }
    let [key, value] = ['', ''];
    fields(reader.bytes(), (inner, innerWire, entry) => {
      if (inner === 1) key = entry.string();
      else if (inner === 2) value = entry.string();
      else entry.skip(innerWire);
    });
    if (key === 'info') document = value;
  });
  return document;
}

/** null for a sandbox in the host's network namespace, or one whose runtime does not say. */
export function netnsOf(info: string): string | null {
  const { pid, runtimeSpec } = JSON.parse(info) as {
    pid?: number;
    runtimeSpec?: { linux?: { namespaces?: { type: string; path?: string }[] } };
  };
  const network = runtimeSpec?.linux?.namespaces?.find(({ type }) => type === 'network');
  if (runtimeSpec !== undefined && network === undefined) return null;
  if (network?.path) return network.path;
  return pid ? `/proc/${pid}/ns/net` : null;
}

function fields(bytes: Uint8Array, visit: (field: number, wire: WireType, reader: BinaryReader) => void): void {
  const reader = new BinaryReader(bytes);
  while (reader.pos < reader.len) {
    const [field, wire] = reader.tag();
    visit(field, wire, reader);
  }
}
