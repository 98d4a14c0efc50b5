// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { constants, gunzipSync } from 'node:zlib';
import protobuf from 'protobufjs';
import descriptor from 'protobufjs/ext/descriptor/index.js';
import { expect, test } from 'vitest';
import { runtimeV1Proto } from './cri.ts';

// A gzip member without flags or time stamp: how generated Go code stores a FileDescriptorProto.
const gzipHeader = Buffer.from([0x1f, 0x8b, 0x08, 0, 0, 0, 0, 0]);
// The CRI descriptor is some 20 kB compressed; what follows it in the executable is ignored.
const memberLimit = 256 * 1024;

/** The descriptor of `packageName` that is linked into the Go executable at `path`. */
function linkedDescriptor(path: string, packageName: string): descriptor.IFileDescriptorProto {
  const executable = readFileSync(path);
  const others: string[] = [];
  for (let at = executable.indexOf(gzipHeader); at >= 0; at = executable.indexOf(gzipHeader, at + 1)) {
    let file: descriptor.IFileDescriptorProto;
    try {
      const member = gunzipSync(executable.subarray(at, at + memberLimit), { finishFlush: constants.Z_SYNC_FLUSH });
      file = descriptor.FileDescriptorProto.decode(member) as descriptor.IFileDescriptorProto;
    } catch {
      continue; // compressed, but no descriptor
    }
    if (file.package === packageName) return file;
    if (file.package) others.push(file.package);
  }
  throw new Error(`${path} holds no descriptor of ${packageName}; it holds ${others.join(', ')}`);
}

type Shape = Map<string, string>;

/** `Message.field` to "number, label, type"; `Enum.VALUE` to its number; `Service/Method` to "request, response". */
function shapeOf(file: descriptor.IFileDescriptorProto): Shape {
  const shape: Shape = new Map();
  // protoc calls a map's entry message FieldEntry, protobufjs calls it Field.
  const withoutEntry = (name: string | null | undefined) => name?.replace(/Entry$/, '');
  const local = (typeName: string | null | undefined) => withoutEntry(typeName?.split('.').at(-1));
  const visit = (message: descriptor.IDescriptorProto, prefix: string) => {
    const name = `${prefix}${withoutEntry(message.name)}`;
    for (const f of message.field ?? []) {
      shape.set(`${name}.${f.name}`, `${f.number}, label ${f.label}, ${local(f.typeName) || `type ${f.type}`}`);
    }
    for (const nested of message.nestedType ?? []) visit(nested, `${name}.`);
  };
  for (const message of file.messageType ?? []) visit(message, '');
  for (const e of file.enumType ?? [])
    for (const v of e.value ?? []) shape.set(`${e.name}.${v.name}`, `${v.number ?? 0}`);
  for (const s of file.service ?? []) {
    for (const m of s.method ?? []) shape.set(`${s.name}/${m.name}`, `${local(m.inputType)}, ${local(m.outputType)}`);
  }
  return shape;
}

test('runtime-v1.proto agrees with the descriptor inside the containerd executable', () => {
  const root = new protobuf.Root().loadSync(runtimeV1Proto, { keepCase: true });
  root.resolveAll();
  const { file } = (root as unknown as { toDescriptor(syntax: string): descriptor.IFileDescriptorSet }).toDescriptor(
    'proto3',
  );
  const ours = shapeOf(file?.find((f) => f.package === 'runtime.v1') ?? {});
  const theirs = shapeOf(linkedDescriptor('/usr/bin/containerd', 'runtime.v1'));
  expect(ours.size).toBeGreaterThan(100);
  const differing = [...ours].filter(([name, is]) => theirs.get(name) !== is);
  expect(differing.map(([name, is]) => `${name}: ours ${is}; containerd ${theirs.get(name) ?? 'has none'}`)).toEqual(
    [],
  );
});
