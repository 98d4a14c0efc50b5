// SPDX-License-Identifier: Apache-2.0
// ZDS, the protocol between a node agent and ztunnel, as both ends need it: one message is one datagram. The agent
// sends requests, ztunnel a Hello and then an answer to each request. Field numbers are those of istio.workload.zds;
// what is above the bytes is plain objects.

import { create, createFileRegistry, type DescMessage, fromBinary, toBinary } from '@bufbuild/protobuf';
import {
  FieldDescriptorProto_Label,
  FieldDescriptorProto_Type,
  type FileDescriptorProto,
  FileDescriptorProtoSchema,
} from '@bufbuild/protobuf/wkt';

/** ztunnel reads into a buffer of this size and takes a longer datagram for an error. */
export const REQUEST_LIMIT = 1_024;
/** The one version of ZDS. */
export const VERSION = 1;

/** A pod as ztunnel looks it up in what it knows from XDS: the three names must be equal to a workload's there. */
export interface WorkloadNames {
  name: string;
  namespace: string;
  serviceAccount: string;
}

/** What the agent sends. `uid` is free text; the netns descriptor of an Add goes beside the message. */
export type ZdsRequest =
  | { kind: 'add'; uid: string; workload: WorkloadNames }
  | { kind: 'keep'; uid: string }
  | { kind: 'del'; uid: string }
  | { kind: 'snapshotSent' };

/** What ztunnel answers; null: it did what it was asked to. */
export interface ZdsAck {
  error: string | null;
}

/** Bytes that are no message of ZDS, or none that can be sent. */
export class ZdsMessageError extends Error {
  override name = 'ZdsMessageError';
}

const { STRING, MESSAGE, INT32 } = FieldDescriptorProto_Type;

interface FieldShape {
  type: FieldDescriptorProto_Type;
  /** of a field of type MESSAGE */
  of?: string;
  oneof?: true;
}

function file(): FileDescriptorProto {
  const message = (name: string, oneof: string | null, fields: Record<number, [string, FieldShape]>) => ({
    name,
    oneofDecl: oneof === null ? [] : [{ name: oneof }],
    field: Object.entries(fields).map(([number, [field, shape]]) => ({
      name: field,
      number: Number(number),
      type: shape.type,
      label: FieldDescriptorProto_Label.OPTIONAL,
      ...(shape.of !== undefined && { typeName: `.zds.${shape.of}` }),
      ...(shape.oneof && { oneofIndex: 0 }),
    })),
  });
  const text: FieldShape = { type: STRING };
  const one = (of: string): FieldShape => ({ type: MESSAGE, of, oneof: true });
  return create(FileDescriptorProtoSchema, {
    name: 'zds.proto',
    package: 'zds',
    syntax: 'proto3',
    messageType: [
      // An enumeration on the wire, which is the same as an int32 and keeps values that nobody has named yet.
      message('Hello', null, { 1: ['version', { type: INT32 }] }),
      message('Info', null, { 1: ['name', text], 2: ['namespace', text], 3: ['service_account', text] }),
      message('Add', null, { 1: ['uid', text], 2: ['workload_info', { type: MESSAGE, of: 'Info' }] }),
      message('Keep', null, { 1: ['uid', text] }),
      // Not 1.
      message('Del', null, { 2: ['uid', text] }),
      message('SnapshotSent', null, {}),
      message('Request', 'payload', {
        1: ['add', one('Add')],
        2: ['del', one('Del')],
        3: ['snapshot_sent', one('SnapshotSent')],
        5: ['keep', one('Keep')],
      }),
      message('Ack', null, { 1: ['error', text] }),
      message('Response', 'payload', { 1: ['ack', one('Ack')] }),
    ],
  });
}

const registry = createFileRegistry(file(), () => undefined);

function schema(name: string): DescMessage {
  const found = registry.getMessage(`zds.${name}`);
  if (found === undefined) throw new Error(`no message ${name} in the schema`);
  return found;
}

const HELLO = schema('Hello');
const REQUEST = schema('Request');
const RESPONSE = schema('Response');

/** Throws ZdsMessageError if ztunnel could not read it. */
export function encodeRequest(request: ZdsRequest): Uint8Array {
  const bytes = toBinary(REQUEST, create(REQUEST, { payload: payloadOf(request) }));
  if (bytes.length > REQUEST_LIMIT) {
    const whose = 'uid' in request ? ` for workload ${request.uid.slice(0, 64)}` : '';
    throw new ZdsMessageError(
      `${request.kind}${whose} takes ${bytes.length} bytes, and ztunnel reads at most ${REQUEST_LIMIT}`,
    );
  }
  return bytes;
}

function payloadOf(request: ZdsRequest): { case: string; value: object } {
  switch (request.kind) {
    case 'add':
      return { case: 'add', value: { uid: request.uid, workloadInfo: { ...request.workload } } };
    case 'keep':
      return { case: 'keep', value: { uid: request.uid } };
    case 'del':
      return { case: 'del', value: { uid: request.uid } };
    case 'snapshotSent':
      return { case: 'snapshotSent', value: {} };
  }
}

/** As ztunnel reads it: `workload` is null where an Add has none. Throws ZdsMessageError. */
export function decodeRequest(
  bytes: Uint8Array,
): Exclude<ZdsRequest, { kind: 'add' }> | { kind: 'add'; uid: string; workload: WorkloadNames | null } {
  const { payload } = decode(REQUEST, bytes) as {
    payload: { case?: string; value?: { uid: string; workloadInfo?: WorkloadNames } };
  };
  const uid = payload.value?.uid ?? '';
  switch (payload.case) {
    case 'add': {
      const info = payload.value?.workloadInfo;
      const workload =
        info === undefined ? null : { name: info.name, namespace: info.namespace, serviceAccount: info.serviceAccount };
      return { kind: 'add', uid, workload };
    }
    case 'keep':
    case 'del':
      return { kind: payload.case, uid };
    case 'snapshotSent':
      return { kind: 'snapshotSent' };
    default:
      throw new ZdsMessageError('a request without a payload');
  }
}

export function encodeHello(version: number = VERSION): Uint8Array {
  return toBinary(HELLO, create(HELLO, { version }));
}

/** The version that ztunnel speaks. Throws ZdsMessageError. */
export function decodeHello(bytes: Uint8Array): number {
  return (decode(HELLO, bytes) as { version: number }).version;
}

export function encodeAck(error: string | null): Uint8Array {
  const value = { error: error ?? '' };
  return toBinary(RESPONSE, create(RESPONSE, { payload: { case: 'ack', value } }));
}

/** Throws ZdsMessageError. */
export function decodeAck(bytes: Uint8Array): ZdsAck {
  const { payload } = decode(RESPONSE, bytes) as { payload: { case?: string; value?: { error: string } } };
  if (payload.case !== 'ack' || payload.value === undefined) throw new ZdsMessageError('an answer without an Ack');
  const { error } = payload.value;
  return { error: error === '' ? null : error };
}

function decode(of: DescMessage, bytes: Uint8Array): unknown {
  try {
    return fromBinary(of, bytes);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new ZdsMessageError(`no ${of.name} can be read from ${bytes.length} bytes: ${why}`, { cause });
  }
}
