// SPDX-License-Identifier: Apache-2.0
// JSON files of other people, edited without a change to any byte that is not meant: where a value is in the text, and
// what stands there. Text is "binary" (a character for each byte), so that what is no UTF-8 survives too.

import { type ArrayNode, type MemberNode, type ObjectNode, parse, type ValueNode } from '@humanwhocodes/momoa';
import { decodeDocument } from '../cni/netconf.ts';

export type Fields = Readonly<Record<string, unknown>>;

/** A piece of the text: from `start` to before `end`. */
export interface Span {
  start: number;
  end: number;
}

/** A document whose root is an object. */
export interface JsonText {
  /** a character for each byte */
  text: string;
  fields: Fields;
  root: ObjectNode;
}

/** Throws CniError 6 for what is not one JSON object in UTF-8 without byte order mark. */
export function readJsonText(bytes: Buffer): JsonText {
  const fields = decodeDocument(bytes);
  const text = bytes.toString('latin1');
  const { body } = parse(text, { mode: 'json', ranges: true });
  // decodeDocument takes null for an empty object, as the runtimes' library does.
  if (body.type !== 'Object') return { text: '{}', fields, root: parse('{}', { ranges: true }).body as ObjectNode };
  return { text, fields, root: body };
}

export function toBytes(text: string): Buffer {
  return Buffer.from(text, 'latin1');
}

export function spanOf(node: ValueNode | MemberNode): Span {
  const [start, end] = node.range ?? [0, 0];
  return { start, end };
}

/** The member that counts where a name is there twice: JSON.parse and Go's maps take the last. */
export function memberOf(object: ObjectNode, name: string): MemberNode | undefined {
  return object.members.findLast(({ name: key }) => key.type === 'String' && key.value === name);
}

export function arrayOf(object: ObjectNode, name: string): ArrayNode | undefined {
  const value = memberOf(object, name)?.value;
  return value?.type === 'Array' ? value : undefined;
}

/**
 * A field as Go's encoding/json finds it: whatever its case. libcni hands a plugin its entry with the keys sorted, so
 * of several spellings the last in byte order counts.
 */
export function foldedField(fields: Fields, name: string): unknown {
  const wanted = name.toLowerCase();
  const key = Object.keys(fields)
    .filter((candidate) => candidate.toLowerCase() === wanted)
    .sort()
    .at(-1);
  return key === undefined ? undefined : fields[key];
}

/** JSON in ASCII, laid out as the text around it: on one line, or with `indent` at the start of each further line. */
export function writeJson(value: unknown, layout: Layout): string {
  const json = layout.unit === '' ? JSON.stringify(value) : JSON.stringify(value, null, layout.unit);
  return json
    .replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`)
    .replaceAll('\n', `${layout.newline}${layout.indent}`);
}

export interface Layout {
  /** '\n' or '\r\n' */
  newline: string;
  /** what a line of the element begins with */
  indent: string;
  /** what each level adds; '': everything on one line */
  unit: string;
}

/** How the elements of `array` are laid out. */
export function layoutOf(text: string, array: ArrayNode): Layout {
  const gap = gapOf(text, array);
  const lineBreak = gap.lastIndexOf('\n');
  if (lineBreak < 0) return { newline: '', indent: '', unit: '' };
  const indent = gap.slice(lineBreak + 1);
  const unit = indent.includes('\t') ? '\t' : indent.length >= 8 ? '    ' : '  ';
  return { newline: gap.includes('\r\n') ? '\r\n' : '\n', indent, unit };
}

/** White space that stands before an element of `array`. */
export function gapOf(text: string, array: ArrayNode): string {
  const first = array.elements[0];
  return first === undefined ? '' : text.slice(spanOf(array).start + 1, spanOf(first.value).start);
}

/** `json` behind the others, of which there is one at least. */
export function appendElement(text: string, array: ArrayNode, json: string): string {
  const last = array.elements.at(-1);
  const { end } = spanOf(last?.value ?? array);
  return splice(text, end, end, `,${gapOf(text, array)}${json}`);
}

/** An element with the comma and the white space that go with it: taken out, the array is as without the element. */
export function elementSpan(array: ArrayNode, at: number): Span {
  const spans = array.elements.map(({ value }) => spanOf(value));
  const element = spans[at] ?? spanOf(array);
  const previous = spans[at - 1];
  if (previous !== undefined) return { start: previous.end, end: element.end };
  return { start: element.start, end: spans[at + 1]?.start ?? element.end };
}

/** Undoes appendElement. */
export function removeElement(text: string, array: ArrayNode, at: number): string {
  const { start, end } = elementSpan(array, at);
  return splice(text, start, end, '');
}

/** Puts back what elementSpan(array, at) was, where there are other elements. */
export function restoreElement(text: string, array: ArrayNode, at: number, removed: string): string {
  const previous = array.elements[Math.min(at, array.elements.length) - 1];
  const where =
    previous === undefined ? spanOf(array).start + 1 + gapOf(text, array).length : spanOf(previous.value).end;
  return splice(text, where, where, removed);
}

export function splice(text: string, start: number, end: number, replacement: string): string {
  return text.slice(0, start) + replacement + text.slice(end);
}
