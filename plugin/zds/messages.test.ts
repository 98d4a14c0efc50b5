// SPDX-License-Identifier: Apache-2.0
// The bytes are those that a real ztunnel sent and understood.
import { describe, expect, test } from 'vitest';
import {
  decodeAck,
  decodeHello,
  decodeRequest,
  encodeAck,
  encodeHello,
  encodeRequest,
  REQUEST_LIMIT,
  ZdsMessageError,
  type ZdsRequest,
} from './messages.ts';

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const bytes = (text: string) => new Uint8Array(Buffer.from(text, 'hex'));
const text = (value: string) => hex(Buffer.from(value));
const workload = { name: 'n', namespace: 'ns', serviceAccount: 'sa' };

describe('bytes on the wire', () => {
  test.each<[ZdsRequest, string]>([
    [{ kind: 'add', uid: 'u', workload }, `0a100a01${text('u')}120b0a01${text('n')}1202${text('ns')}1a02${text('sa')}`],
    [{ kind: 'keep', uid: 'u' }, `2a030a01${text('u')}`],
    [{ kind: 'del', uid: 'u' }, `12031201${text('u')}`],
    [{ kind: 'snapshotSent' }, '1a00'],
  ])('%j', (request, wire) => {
    expect(hex(encodeRequest(request))).toBe(wire);
    expect(decodeRequest(bytes(wire))).toEqual(request);
  });

  test('Hello and Ack', () => {
    expect(hex(encodeHello())).toBe('0801');
    expect(decodeHello(bytes('0801'))).toBe(1);
    expect(decodeHello(bytes('0863'))).toBe(99);
    expect(hex(encodeAck(null))).toBe('0a00');
    expect(decodeAck(bytes('0a00'))).toEqual({ error: null });
    expect(decodeAck(encodeAck('no: ü'))).toEqual({ error: 'no: ü' });
  });

  test('workload_info is there also when all its names are empty', () => {
    const wire = encodeRequest({ kind: 'add', uid: 'u', workload: { name: '', namespace: '', serviceAccount: '' } });
    expect(hex(wire)).toBe(`0a050a01${text('u')}1200`);
    expect(decodeRequest(bytes(`0a030a01${text('u')}`))).toEqual({ kind: 'add', uid: 'u', workload: null });
  });

  test('fields that a later version may have are passed over', () => {
    expect(decodeAck(bytes('0a00f2030131'))).toEqual({ error: null });
    expect(decodeHello(bytes('08011a0131'))).toBe(1);
  });
});

test('the longest request is the longest that ztunnel reads', () => {
  // 12 bytes around the uid: tags and lengths of Add, uid, workload_info and its fields.
  const sized = (length: number) => encodeRequest({ kind: 'keep', uid: 'u'.repeat(length) });
  expect(sized(REQUEST_LIMIT - 6).length).toBe(REQUEST_LIMIT);
  expect(() => sized(REQUEST_LIMIT - 5)).toThrow(
    new ZdsMessageError(`keep for workload ${'u'.repeat(64)} takes 1025 bytes, and ztunnel reads at most 1024`),
  );
});

test.each(['', '1a00', '22020a00', '0a', '0a05', '0aff', '08', 'ffffffffffffffffffffff01', '0b', '0b0b0b'])(
  'no Ack can be read from %j',
  (wire) => {
    expect(() => decodeAck(bytes(wire))).toThrow(ZdsMessageError);
  },
);

test.each(['', '0a05', '08', '2200', '0c'])('no request can be read from %j', (wire) => {
  expect(() => decodeRequest(bytes(wire))).toThrow(ZdsMessageError);
});
