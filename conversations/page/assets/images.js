// Images: thumbnails in the place where they stand, the whole in a dialog, boxes where a tool cropped.

const PICTURE = /^data:image\/png;base64,[A-Za-z0-9+/=]+$/;
const SAME_RATIO = 0.2; // a tool resizes its image to multiples of some pixels

/** The elements of a message's content: texts, and images in their places. */
function said(value, record, kind) {
  if (!Array.isArray(value)) return [textBlock(value ?? '', kind)];
  return value.map((part) => (part && part.type === 'image' ? figure(hashOf(part.image), record) : textBlock((part && part.text) ?? '', kind)));
}

const hashOf = (reference) => String(reference ?? '').replace(/^sha256:/, '');

/** Text of a content alone; `mark` stands for each image. */
function textOf(value, mark = '<image>') {
  if (!Array.isArray(value)) return String(value ?? '');
  return value.map((part) => (part && part.type === 'image' ? mark : String((part && part.text) ?? ''))).join('');
}

/** One image as a button that opens the whole of it, with a box drawn on it if one is given. */
function figure(sha256, record, box = null) {
  const source = (record.pictures || {})[sha256];
  const known = (record.images || []).find((image) => image.sha256 === sha256);
  const size = known ? `${count(known.width)}×${count(known.height)}` : '';
  const tokens = known ? plural(known.end - known.start, 'token') : 'not in the tokens';
  const caption = h('figcaption', { class: 'meta', text: [size, tokens, brief(sha256, 12)].filter(Boolean).join(' · ') });
  if (typeof source !== 'string' || !PICTURE.test(source)) {
    return h('figure', { class: 'picture' }, h('div', { class: 'text none', text: '(image not in this page)' }), caption);
  }
  const label = box ? 'The region that the tool cropped' : 'Image';
  const open = h('button', { type: 'button', class: 'thumb', title: 'Show it whole', 'aria-label': `${label} ${size}: show it whole`, on: { click: () => showWhole(source, box, label) } }, framed(source, box, label));
  return h('figure', { class: 'picture' }, open, caption);
}

function framed(source, box, label) {
  const frame = h('span', { class: 'frame' }, h('img', { src: source, alt: label, loading: 'lazy', decoding: 'async' }));
  if (box) {
    const mark = h('span', { class: 'box' });
    for (const [side, share] of Object.entries(box)) mark.style[side] = `${100 * share}%`;
    frame.append(mark);
  }
  return frame;
}

function showWhole(source, box, label) {
  const dialog = h('dialog', { class: 'whole-picture', 'aria-label': label, on: { click: () => dialog.close(), close: () => dialog.remove() } },
    framed(source, box, label), h('button', { type: 'button', class: 'more', text: 'Close' }));
  document.body.append(dialog);
  dialog.showModal();
}

/** The image that a call cropped, with the box; null for calls that say nothing of one. */
function cropped(call, record) {
  const { box, box_in: inside } = call.metrics || {};
  const first = (record.images || [])[0];
  const fine = (list, length) => Array.isArray(list) && list.length === length && list.every(Number.isFinite);
  if (!first || !fine(box, 4) || !fine(inside, 2) || !(inside[0] > 0 && inside[1] > 0)) return null;
  const ratio = (inside[0] / inside[1]) / (first.width / first.height);
  if (Math.abs(ratio - 1) > SAME_RATIO) return null; // of an image of its own
  const share = (value, whole) => Math.min(1, Math.max(0, value / whole));
  const left = share(box[0], inside[0]);
  const top = share(box[1], inside[1]);
  const place = { left, top, width: share(box[2], inside[0]) - left, height: share(box[3], inside[1]) - top };
  return h('div', { class: 'cropped' }, h('span', { class: 'tag', text: 'cropped here' }), figure(first.sha256, record, place));
}
